"""The cache folder: whole or not at all, whoever made it, whatever became of it."""

import errno
import os
import re
import signal
import stat
import subprocess
import sys

import pytest
from safetensors import SafetensorError

import interventions
from interventions import ModelError, TextError, load_model
from interventions.cache import cache_folder, making
from interventions.models import packaged
from tests import tiny
from tests.tiny import tiny_model


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A cache of one's own, into which a tiny model is converted; how often it was."""
    calls = []

    def convert(source, gguf, folder):
        calls.append(folder)
        tiny_model("llama").save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "a.gguf").write_bytes(b"12345")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packaged, "_PACKAGED", ("package", "a.gguf"))
    monkeypatch.setattr(packaged, "_convert_gguf", convert)
    monkeypatch.setenv("MECHDIAG_CACHE", str(tmp_path / "cache"))
    return calls


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a byte of the weights": lambda f: flipped(f / "model.safetensors"),
    "weights cut short": lambda f: os.truncate(f / "model.safetensors", 5000),
    "weights gone": lambda f: (f / "model.safetensors").unlink(),
    "another configuration": lambda f: (f / "config.json").write_text("{}"),
    "tokenizer gone": lambda f: (f / "tokenizer.json").unlink(),
    "digests": lambda f: (f / "sha256.json").write_text("[1"),
    "digests of another kind": lambda f: (f / "sha256.json").write_text("[1]"),
    "all but the folder": lambda f: [path.unlink() for path in f.iterdir()],
}


def without_digests(folder):
    (folder / "sha256.json").unlink()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_converted_again(converted, name):
    folder = packaged.packaged_model_folder()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "sha256.json"}
    assert packaged.packaged_model_folder() == folder and len(converted) == 1
    DAMAGES[name](folder)
    with pytest.warns(UserWarning, match=r"the packaged model in .* was damaged \(.*\); it was converted again"):
        packaged.packaged_model_folder()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "sha256.json"} == before
    assert packaged.packaged_model_folder() == folder and len(converted) == 2
    assert sorted(path.name for path in cache_folder().iterdir()) == [folder.name, f"{folder.name}.lock"]


@pytest.mark.parametrize("name", ["weights cut short", "weights gone", "tokenizer gone"])
def test_folders_of_earlier_versions_are_checked(converted, name):
    folder = packaged.packaged_model_folder()
    without_digests(folder)
    assert packaged.packaged_model_folder() == folder and len(converted) == 1  # whole: it gets its digests
    assert (folder / "sha256.json").exists()
    without_digests(folder)
    DAMAGES[name](folder)
    with pytest.warns(UserWarning, match="was damaged"):
        packaged.packaged_model_folder()
    assert len(converted) == 2


def test_copied_cache_is_not_converted_again(converted):
    """The copy has other file times but the same bytes."""
    folder = packaged.packaged_model_folder()
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert load_model(device="cpu").tokenizer("w5 w96").input_ids == [5, 96]
    assert len(converted) == 1


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_cache_permissions_follow_the_umask(converted, mask):
    old = os.umask(mask)
    try:
        folder = packaged.packaged_model_folder()
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert (stat.S_IMODE(folder.stat().st_mode), modes) == (0o777 & ~mask, {0o666 & ~mask})


def test_complete_folder_is_read_without_writing(converted, monkeypatch):
    """A second user may write neither the lock nor the folder."""
    folder = packaged.packaged_model_folder()
    monkeypatch.setattr(packaged, "making", lambda *_: pytest.fail("would write"))
    monkeypatch.setattr(packaged, "_write_digests", lambda *_: pytest.fail("would write"))
    assert packaged.packaged_model_folder() == folder

    def refused(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(packaged, "_write_digests", refused)
    without_digests(folder)
    assert packaged.packaged_model_folder() == folder


@pytest.mark.parametrize("where", ["mkdir", "stat"])
def test_inaccessible_cache_raises(converted, monkeypatch, where):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = cache_folder()
    monkeypatch.setattr(type(folder), where, refused)
    with pytest.raises(ModelError, match=r"cannot (read|write) .*Permission denied.*MECHDIAG_CACHE"):
        packaged._damage(folder) if where == "stat" else packaged.packaged_model_folder()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("unexpected pos 12 vs 10: No space left"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_raises_and_leaves_nothing(converted, monkeypatch, error):
    def convert(source, gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(packaged, "_convert_gguf", convert)
    with pytest.raises(ModelError, match=r"No space left.*540 MB: free space there, or set MECHDIAG_CACHE"):
        packaged.packaged_model_folder()
    assert [path.suffix for path in cache_folder().iterdir()] == [".lock"]


def test_unavailable_lock_raises(tmp_path, monkeypatch):
    from filelock import FileLock

    def refused(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refused)
    with pytest.raises(TextError, match="No locks available"), making(tmp_path / "a", TextError):
        pass


def test_files_left_by_a_killed_process_are_removed(converted, tmp_path):
    """The process is killed while it holds the lock and has written half a file; folders of other names are kept."""
    script = (
        "import sys, time, types\nfrom pathlib import Path\n"
        "sys.modules['interventions'] = types.ModuleType('interventions')\n"  # its imports take seconds
        f"sys.modules['interventions'].__path__ = {list(interventions.__path__)}\n"
        "from interventions.cache import making\n"
        "from interventions.errors import ModelError\n"
        "with making(Path(sys.argv[1]), ModelError) as partial:\n"
        "    (partial / 'model.safetensors').write_bytes(b'half')\n    print('written', flush=True)\n    time.sleep(600)\n"
    )
    folder = cache_folder() / "smollm2-135m-5"
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (cache_folder() / "smollm2-135m-55.partial-0").mkdir()
    (cache_folder() / "tmpabcdefgh").mkdir()
    assert any(re.fullmatch(r"smollm2-135m-5\.partial-\w+", path.name) for path in cache_folder().iterdir())
    assert packaged.packaged_model_folder() == folder
    kept = ["smollm2-135m-5", "smollm2-135m-5.lock", "smollm2-135m-55.partial-0", "tmpabcdefgh"]
    assert sorted(path.name for path in cache_folder().iterdir()) == kept


@pytest.mark.parametrize("unset", ["", None])
def test_default_cache_folder_is_not_the_working_directory(monkeypatch, tmp_path, unset):
    """Not the working directory."""
    monkeypatch.delenv("MECHDIAG_CACHE", raising=False)
    if unset is not None:
        monkeypatch.setenv("MECHDIAG_CACHE", unset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mechdiag"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mechdiag"
    monkeypatch.setenv("MECHDIAG_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def test_missing_conversion_package_is_named(converted, monkeypatch):
    def convert(*_):
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    monkeypatch.setattr(packaged, "_convert_gguf", convert)
    with pytest.raises(ModelError, match=r"install torch and gguf.*; install what it names"):
        packaged.packaged_model_folder()
