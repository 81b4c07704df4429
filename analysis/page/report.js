"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;
  const said = document.getElementById("said");
  const plots = [...document.querySelectorAll(".plot")];
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const of = (div) => charts[div.dataset.chart].plots[div.dataset.panel];

  function layout(plot) {
    const ink = colour("--ink"), line = colour("--line");
    const axis = (own) => ({
      ...own, gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true,
      title: { ...own.title, standoff: 8 },
    });
    return {
      ...plot.layout, xaxis: axis(plot.layout.xaxis), yaxis: axis(plot.layout.yaxis),
      title: { text: plot.title, font: { size: 14 } }, showlegend: false, autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      font: { color: ink, family: "system-ui, sans-serif", size: 12 },
      margin: { l: 56, r: 16, t: plot.title ? 34 : 12, b: 48 },
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: line, font: { color: ink } },
    };
  }

  function draw(div) {
    const plot = of(div);
    const hidden = div.hiddenSeries || new Set();
    const traces = plot.traces.map((t) => ({ ...t, visible: !hidden.has(t.name) }));
    div.dataset.drawn = "yes";
    return Plotly.react(div, traces, layout(plot), {
      responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
    });
  }

  // Those in sight first: a page of many figures opens at once.
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "300px" });
  plots.forEach((div) => seen.observe(div));

  function dress(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    document.getElementById("theme").textContent = dark ? "Light" : "Dark";
    plots.filter((div) => div.dataset.drawn).forEach(draw);
  }
  const system = matchMedia("(prefers-color-scheme: dark)");
  dress(system.matches);
  system.addEventListener("change", () => dress(system.matches));
  document.getElementById("theme").addEventListener("click", () =>
    dress(root.dataset.theme !== "dark"));
  let before;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    plots.forEach(draw);
  });
  addEventListener("afterprint", () => dress(before === "dark"));

  // A series is shown or hidden in all panels of its figure.
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", String(on));
      for (const div of button.closest("figure").querySelectorAll(".plot")) {
        div.hiddenSeries = div.hiddenSeries || new Set();
        div.hiddenSeries[on ? "delete" : "add"](button.dataset.series);
        if (div.dataset.drawn) draw(div);
      }
    });
  }

  // Arrow keys walk over points, left and right, and series, up and down; each is read out.
  const number = (x) => (typeof x === "number" ? Number(x.toPrecision(4)).toString() : x);
  for (const div of plots) {
    let at = [0, -1];
    div.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
      const move = moves[event.key];
      const hidden = div.hiddenSeries || new Set();
      const traces = of(div).traces.map((t, i) => [t, i])
        .filter(([t]) => t.type === "scatter" && !hidden.has(t.name));
      if (!move || !traces.length) return;
      event.preventDefault();
      const which = (at[0] + move[0] + traces.length) % traces.length;
      const [trace, curve] = traces[which];
      const point = Math.min(Math.max(at[1] + move[1], 0), trace.x.length - 1);
      at = [which, point];
      const rest = [trace.customdata, trace.text].map((list) => list && list[point]);
      said.textContent = [`${trace.name}: ${number(trace.y[point])} at ${number(trace.x[point])}`,
        ...rest.filter((part) => part !== undefined && part !== null && part !== "").map(number)]
        .join(", ");
      if (!div.dataset.drawn) draw(div);
      Plotly.Fx.hover(div, [{ curveNumber: curve, pointNumber: point }]);
    });
  }

  for (const button of document.querySelectorAll("button.csv")) {
    button.addEventListener("click", () => {
      const quote = (v) => (/[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : v ?? "");
      const rows = [["panel", "series", "x", "y"]];
      charts[button.dataset.chart].plots.forEach((plot, panel) => plot.traces.forEach((t) => {
        if (t.type === "scatter") t.x.forEach((x, i) => rows.push([panel, t.name, x, t.y[i]]));
        else t.customdata.forEach((row, i) => row.forEach((z, j) => rows.push([panel, t.name,
          `${t.x[j]} to ${t.x[j + 1]}`, `${t.y[i]} to ${t.y[i + 1]}: ${z}`])));
      }));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([rows.map((r) => r.map(quote).join(",")).join("\n")]));
      link.download = `${button.dataset.chart}.csv`;
      link.click();
    });
  }
})();
