"""Places: what fits into them, and what is known of GPUs."""

import importlib.util
import re
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.errors import BadInput
from orchestrator import place
from orchestrator.place import Node, Place


def test_here_is_this_machine() -> None:
    found = place.here()
    (node,) = found.nodes
    assert found.name == "this machine" and (node.count, node.most) == (1, 1)
    process = psutil.Process()
    free = process.cpu_affinity() if hasattr(process, "cpu_affinity") else range(psutil.cpu_count())
    assert node.cpus == place.cores() == len(free)
    assert node.memory == psutil.virtual_memory().total


def test_a_place_has_the_gpus_that_its_name_says() -> None:
    found = place.named("8xA100-80G")
    assert [(n.gpus, n.gpu, n.room, n.memory) for n in found.nodes] == [
        (8, "A100-80G", 80_000_000_000, None)
    ]
    assert place.at_once(found, 8, 64, 1) == (1, 1)
    assert place.at_once(found, 3, 1, 1) == (2, 2)


@pytest.mark.parametrize("text", ["A100", "0xA100", "8xB52", "-1xT4", "8 x T4", "8xt4", "", "8x"])
def test_a_name_that_nobody_knows_is_refused_with_those_known(text: str) -> None:
    with pytest.raises(BadInput, match=rf"--on: '{text}': .* known are T4, L4, .*H100"):
        place.named(text)


def test_gpus_are_called_as_ray_calls_them() -> None:
    """Its file is read, not loaded."""
    spec = importlib.util.find_spec("ray")
    assert spec and spec.origin
    names = Path(spec.origin).with_name("util") / "accelerators" / "accelerators.py"
    assert set(place.GPUS) <= set(re.findall(r'"(.+?)"', names.read_text()))


# Of the architectures' white papers: multiprocessors, FLOPs of one a cycle in fp32 (two a core)
# and, dense, in bf16 on tensor cores; boost GHz.
CHIPS = {
    "T4": (40, 128, 128, 1.59),
    "L4": (58, 256, 1024, 2.04),
    "A10G": (80, 256, 512, 1.71),
    "L40S": (142, 256, 1024, 2.52),
    "A100": (108, 128, 2048, 1.41),
    "A100-40G": (108, 128, 2048, 1.41),
    "A100-80G": (108, 128, 2048, 1.41),
    "H100": (132, 256, 4096, 1.98),
    "H200": (132, 256, 4096, 1.98),
    "B200": (148, 256, 8192, 1.965),
}


@pytest.mark.parametrize("name", place.GPUS)
def test_peaks_are_what_the_chips_can(name: str) -> None:
    """Multiprocessors x FLOPs a cycle x clock; tensor cores of the largest run a little slower."""
    count, fp32, bf16, clock = CHIPS[name]
    assert place.GPUS[name].fp32 == pytest.approx(count * fp32 * clock * 1e9, rel=0.02)
    assert place.GPUS[name].bf16 == pytest.approx(count * bf16 * clock * 1e9, rel=0.08)


def test_a_cluster_that_must_grow_fits_later() -> None:
    head = Node(0, 0, None, None, 1, 1)
    growing = Place("the cluster", (head, Node(4, 1, "L4", None, 1, 5)))
    assert place.at_once(growing, 1, 1, 1) == (1, 5)
    assert place.at_once(growing, 4, 1, 1) == (0, 1)
    assert place.at_once(growing, 1, 2, 0) == (2, 10)
    assert place.at_once(growing, 6, 1, 1) == (0, 0)
    assert place.at_once(growing, 1, 5, 0) == (0, 0)


def test_a_cluster_file_says_how_far_it_grows() -> None:
    """Its head has no CPU; three kinds with one GPU, up to eight of each, and one with eight, but
    no more than eight machines in all."""
    found = place.launched(Path(place.__file__).parents[1] / "cluster.yaml")
    assert [(n.cpus, n.gpus, n.count, n.most) for n in found.nodes] == [
        (0, 0, 1, 1),
        *[(4, 1, 0, 8)] * 3,
        (96, 8, 0, 1),
    ]
    assert place.at_once(found, 8, 4, 1) == (0, (8 + 7) // 8)


nodes = st.builds(
    Node,
    cpus=st.integers(0, 9),
    gpus=st.integers(0, 4),
    gpu=st.none(),
    memory=st.none(),
    count=st.integers(0, 3),
    most=st.integers(0, 3),
)


@given(
    many=st.lists(nodes, max_size=3),
    workers=st.integers(1, 5),
    cpus=st.integers(1, 4),
    gpus=st.sampled_from([0, 0.1, 0.25, 0.3, 0.5, 0.7, 1, 2]),
)
def test_as_many_fit_as_can_be_put_one_by_one(
    many: list[Node], workers: int, cpus: int, gpus: float
) -> None:
    def put(node: Node) -> int:
        """On one machine, each on the first GPU or GPUs with enough left."""
        left, share, done = [Fraction(1)] * node.gpus, Fraction(str(gpus)), 0
        while cpus * (done + 1) <= node.cpus:
            if gpus >= 1:
                free = [i for i, rest in enumerate(left) if rest == 1][: int(gpus)]
                if len(free) < gpus:
                    break
                left = [Fraction(0) if i in free else rest for i, rest in enumerate(left)]
            elif gpus:
                free = [i for i, rest in enumerate(left) if rest >= share][:1]
                if not free:
                    break
                left[free[0]] -= share
            done += 1
        return done

    found = place.at_once(Place("somewhere", tuple(many)), workers, cpus, gpus)
    assert found == (
        sum(node.count * put(node) for node in many) // workers,
        sum(node.most * put(node) for node in many) // workers,
    )


def test_a_file_for_ray_up_is_a_place_that_grows_from_its_head() -> None:
    """As cluster.yaml's own account has it, read here line by line."""
    root = Path(__file__).parents[2]
    # Eight machines: one of 8 GPUs and seven of one; in the other file all have one.
    for name, gpus in (("cluster.yaml", 15), ("clusters/gcp.yaml", 8)):
        text = (root / name).read_text()
        found = place.find(str(root / name))
        said = r"resources: \{CPU: (\d+), GPU: ([1-9]\d*), .accelerator_type:(\S+).:"
        kinds = re.findall(said, text)
        assert [(str(n.cpus), str(n.gpus), n.gpu) for n in found.nodes if n.gpus] == kinds
        assert len(kinds) >= 3
        assert place.at_once(found, 1, 4, 1) == (0, gpus)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "no file for `ray up`"),
        ("]", "no file for `ray up`"),
        ("- 1", "no file for `ray up`"),
        ("available_node_types: {a: {}}", "no file for `ray up`"),
        ("{max_workers: x, head_node_type: a, available_node_types: {b: {}}}", "no file"),
        ("provider: {type: local}", "does not say what its machines have"),
    ],
)
def test_another_file_is_no_place(tmp_path: Path, text: str | None, wanted: str) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadInput, match=wanted):
        place.find(str(file))


def test_a_file_bounds_its_machines_together() -> None:
    """At most five, the head among them: three of 8 GPUs leave one of 2."""
    nodes = (
        Node(0, 0, None, None, 1, 1),
        Node(8, 8, "A100", None, 0, 3),
        Node(8, 2, "L4", None, 0, 4),
    )
    bounded, free = Place("x", nodes, 5), Place("x", nodes)
    assert place.at_once(bounded, 1, 1, 1) == (0, 3 * 8 + 2)
    assert place.at_once(free, 1, 1, 1) == (0, 3 * 8 + 4 * 2)
    assert place.at_once(bounded, 16, 1, 1) == (0, 1)
    beyond = Place("x", (Node(2, 0, None, None, 4, 4),), 3)  # machines that came by themselves
    assert place.at_once(beyond, 1, 1, 0) == (8, 8)
