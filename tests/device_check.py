"""One look at the engine on a GPU: exactness, waits of the host, what KL costs, rows a second on real shapes, its own tests.

python -m tests.device_check --device cuda --seconds 480 --out results/device_check
python -m tests.device_check --device cpu --tiny --seconds 60 --out DIR          (a dry run)

Weights are random: shapes only, nothing is downloaded. Each section stands alone: what fails is noted and the next one runs; none
begins without time for it. All numbers go to DIR/device_check.json; the last lines printed are a short table. Exits with 1 where a section
failed or replay is not exact.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from interventions import Site, fused, measure, record, wrap
from interventions.metrics import CleanRows, CleanSide, Comparison
from interventions.replaying.hooks import hooked_logits
from interventions.replaying.placed import placed
from interventions.replaying.replay import Branches, entering_at, replayed, unembed

ROOT = Path(__file__).parents[1]
SHAPES = {
    "qwen3-8b": dict(
        kind="Qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False, layer=18),
    "gemma2-2b": dict(
        kind="Gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, vocab_size=256000, sliding_window=4096, layer=13),
    "smollm2-135m": dict(
        kind="Llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=49152, tie_word_embeddings=True, layer=15),
}  # fmt: skip
_SMALL = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
              head_dim=32, vocab_size=8192, layer=2)  # fmt: skip
_TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, vocab_size=503, layer=1)  # fmt: skip
_FIVE = ("kl", "js", "clean_entropy", "top1_changed", "kl_direct")
_TESTS = ("test_metrics.py", "test_fused.py", "test_recording.py", "test_effects.py", "test_inside.py", "replaying")
_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5.0}
"""Largest |difference of KL| between replay and full passes ÷ median KL: 10 times and more what a CPU shows (5e-5 and .5)."""


class Check:
    """What was found so far, and for how long there is time."""

    def __init__(self, device: str, tiny: bool, seconds: float, out: Path):
        self.device, self.tiny, self.seconds, self.out = device, tiny, seconds, out
        self.cuda, self.began = device.startswith("cuda"), time.perf_counter()
        self.found: dict[str, Any] = {}
        self.table: list[str] = []
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        self.table.append(text)
        print(f"[{time.perf_counter() - self.began:6.1f} s] {text}", flush=True)

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def run(self, name: str, needs: float, section: Callable[["Check"], Any]) -> None:
        """One section, if there are as many seconds left as it needs."""
        if self.left() < needs:
            self.say(f"{name}: left out, {self.left():.0f} s left of {needs:.0f}")
            return
        try:
            self.found[name] = section(self)
        except Exception as error:
            self.found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            print(traceback.format_exc()[-3000:], flush=True)
            self.fail(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
        self.free()
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "device_check.json").write_text(
            json.dumps({**self.found, "table": self.table}, indent=1, default=str)
        )

    def fail(self, text: str) -> None:
        self.failed.append(text)
        self.say(f"FAILED {text}")

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def median(self, fn: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
        """Seconds of a call, with everything on the device done before and after."""
        for _ in range(warm):
            fn()
        times = []
        for _ in range(repeats):
            self.sync()
            begin = time.perf_counter()
            fn()
            self.sync()
            times.append(time.perf_counter() - begin)
        return float(np.median(times))

    def peak(self, fn: Callable[[], Any]) -> tuple[float, Any]:
        """GiB beyond what was held before (nan on the CPU), and what the call gave."""
        if not self.cuda:
            return float("nan"), fn()
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = fn()
        self.sync()
        return (torch.cuda.max_memory_allocated() - before) / 2**30, value

    def model(self, kind: str, dtype: torch.dtype, shape: dict[str, Any], std: float = 0.02) -> tuple[Any, int]:
        """A model of random weights, and a block of it."""
        shape = {**shape, **_TINY} if self.tiny else {**shape}
        layer = shape.pop("layer")
        config = getattr(transformers, f"{kind}Config")(**{k: v for k, v in shape.items() if k != "kind"})
        config._attn_implementation = "eager" if kind == "Gemma2" else "sdpa"
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(self.device):
                hf = getattr(transformers, f"{kind}ForCausalLM")(config)
        finally:
            torch.set_default_dtype(before)
        for weight in hf.eval().requires_grad_(False).parameters():
            if weight.ndim > 1:
                weight.normal_(0, std)
        return wrap(hf), layer


def _prompts(n: int, length: int, vocab: int, vary: bool = False) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [length - (i * 7) % (length // 2) if vary else length for i in range(n)]
    return [torch.randint(1, vocab, (k,), generator=generator).tolist() for k in lengths]


def _rows(recording: Any, site: Site, n: int, edits: int, last: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """n rows, `edits` at each token, tokens again where there are too few: prompt, position and vectors."""
    generator = torch.Generator().manual_seed(2)
    where = torch.tensor(
        [(i, t) for i, length in enumerate(recording.length.tolist()) for t in range(1, length - last)]
    )
    pick = torch.randperm(len(where), generator=generator)
    pick = pick.repeat(-(-n // (edits * len(pick))))[: -(-n // edits)]
    prompt, position = where[pick].repeat_interleave(edits, 0)[:n].T.contiguous()
    x = recording.at(site, prompt, position)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return prompt, position, x + noise * x.float().pow(2).mean(-1, keepdim=True).sqrt().to(x)


def machine(check: Check) -> dict[str, Any]:
    said = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    if check.cuda:
        said |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "GiB": torch.cuda.get_device_properties(0).total_memory / 2**30,
        }
    n, k = (2**20, 256) if check.tiny else (2**29, 8192)
    a = torch.randn(n, device=check.device)
    b = torch.empty_like(a)
    said["copy_GBps"] = 8 * n / check.median(lambda: b.copy_(a), 5) / 1e9
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(k, k, device=check.device, dtype=dtype)
        said[f"{str(dtype)[6:]}_TFLOPs"] = 2 * k**3 / check.median(lambda x=x: x @ x) / 1e12
    check.say(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in said.items()))
    return said


def parity(check: Check) -> dict[str, Any]:
    """Replay against full forward passes on the device, and the device against the CPU."""
    out: dict[str, Any] = {}
    n, length = (24, 24) if check.tiny else (96, 96)
    for dtype in (torch.float32, torch.bfloat16):
        worst = 0.0
        for kind in ("Llama",) if check.tiny else ("Llama", "Qwen3", "Gemma2"):
            model, layer = check.model(kind, dtype, _SMALL, std=0.08)
            site, inside = Site(layer), Site(layer, "attn_out")
            texts = _prompts(6, length, model.vocab_size, vary=True)
            r = record(model, texts, [site, inside])
            for name, at, horizon in (("1", site, 1), ("8", site, 8), ("last", site, "last"), ("attn_out", inside, 1)):
                rows = _rows(r, at, n, 3, last=9)
                how = dict(metrics=("kl", "js", "kl_direct", "top1_changed"), horizon=horizon)
                fast, again = (measure(r, at, *rows, path="auto", **how) for _ in range(2))
                slow = measure(r, at, *rows, path="hooks", **how)
                kl, ref = fast["kl"].double(), slow["kl"].double()
                entry = {
                    "path": fast.path, "why_hooks": fast.why_hooks, "delta_logits": fast.delta,
                    "median_kl": float(ref.nanmedian()), "max_abs_kl": float((kl - ref).abs().nan_to_num().max()),
                    "top1_differs": int((fast["top1_changed"] != slow["top1_changed"]).sum()),
                    "same_bits_twice": all(torch.equal(fast[k].nan_to_num(), again[k].nan_to_num()) for k in fast.values),
                    "not_finite": fast.n_nonfinite,
                }  # fmt: skip
                key = f"{kind} {str(dtype)[6:]} {name}"
                out[key], off = entry, entry["max_abs_kl"] / max(entry["median_kl"], 1e-9)
                worst = max(worst, off)
                if fast.path != "replay" or not entry["same_bits_twice"] or off > _ALLOWED[dtype]:
                    check.fail(f"parity, {key}: {entry}")
            if check.cuda and dtype == torch.float32:
                rows = _rows(r, site, 48, 3, last=9)
                gpu = measure(r, site, *rows)["kl"]
                c = record(wrap(model.hf.to("cpu")), texts, [site])
                cpu = measure(c, site, *rows[:2], rows[2].cpu())["kl"]
                out[f"{kind} GPU against CPU"] = float(((gpu - cpu).abs() / cpu.clamp(min=1e-9)).max())
            del model, r
            check.free()
        check.say(f"parity {str(dtype)[6:]}: largest |KL by replay − by full passes| ÷ median KL: {worst:.1e}")
    across = {k.split()[0]: f"{v:.1e}" for k, v in out.items() if isinstance(v, float)}
    check.say(f"parity: GPU against CPU, largest relative difference of KL: {across or 'not measured'}")
    return out


def waits(check: Check) -> dict[str, Any]:
    """Where the host waits for the device, by line, as PyTorch itself says. More chunks must not mean more waits."""
    model, layer = check.model("Qwen3", torch.bfloat16, _SMALL)
    r = record(model, _prompts(8, 24 if check.tiny else 96, model.vocab_size), [Site(layer)])
    rows = _rows(r, Site(layer), 64 if check.tiny else 512, 1)
    out: dict[str, Any] = {}
    for name, metrics in (("kl", ("kl",)), ("the study's five metrics", _FIVE)):
        counts = []
        for chunks in (2, 8):
            how = dict(metrics=metrics, batch_rows=len(rows[0]) // chunks)
            measure(r, Site(layer), *rows, **how)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                if check.cuda:
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    measure(r, Site(layer), *rows, **how)
                finally:
                    if check.cuda:
                        torch.cuda.set_sync_debug_mode("default")
            counts.append(
                Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message))
            )
        few, many = (sum(count.values()) for count in counts)
        out[name] = {"of 2 chunks": few, "of 8 chunks": many, "by_line": dict(counts[1].most_common(20))}
        check.say(f"waits, {name}: {few} in 2 chunks, {many} in 8; {dict(counts[1].most_common(6))}")
        if many > few:
            check.fail(f"waits, {name}: {(many - few) / 6:.1f} a chunk; expected none")
    return out


def kl(check: Check) -> dict[str, Any]:
    """Seconds, memory and error of KL: by one kernel, and by torch operation by operation."""
    out: dict[str, Any] = {}
    for vocab in [503] if check.tiny else [49152, 151936, 256000]:
        n, m = (10, 2) if check.tiny else (1000, 200)
        torch.manual_seed(0)
        c = 3 * torch.randn(m, vocab, device=check.device)
        index = torch.arange(m, device=check.device).repeat_interleave(n // m)
        x = c[index] + torch.logspace(-3, 0, n, device=check.device)[:, None] * torch.randn(
            n, vocab, device=check.device
        )
        few = torch.arange(0, n, max(1, n // 20), device=check.device)
        log_p, log_q = c[index[few]].double().log_softmax(-1), x[few].double().log_softmax(-1)
        exact = (log_p.exp() * (log_p - log_q)).sum(-1)
        ways: dict[str, Callable[[], Tensor]] = {
            "torch": lambda c=c, x=x, index=index: (
                Comparison(CleanRows(CleanSide(c), index), x, split=not check.cuda).kl
            )
        }
        if fused.usable(x):
            half = x.bfloat16()  # its error is that of the rounded logits
            ways["kernel"] = lambda c=c, x=x, index=index: fused.compare(x, c, index, js=False)["kl"]
            ways["kernel with JS"] = lambda c=c, x=x, index=index: fused.compare(x, c, index)["kl"]
            ways["kernel, bf16 logits"] = lambda c=c, x=half, index=index: fused.compare(x, c, index, js=False)["kl"]
        elif check.cuda:
            check.fail("kl: the kernel does not run here")
        for name, way in ways.items():
            gib, value = check.peak(way)
            t = check.median(way, 5)
            error = float(((value[few].double() - exact).abs() / exact).max())
            out[f"{name} V={vocab}"] = {"us_a_row": 1e6 * t / n, "GiB": gib, "relative_error": error}
            check.say(f"KL V={vocab} {name}: {1e6 * t / n:.2f} us a row, {gib:.2f} GiB, relative error {error:.0e}")
            if "bf16" not in name and error > 1e-3:
                check.fail(f"kl V={vocab} {name}: relative error {error:.0e}; expected 1e-4 or less")
    return out


def bench(name: str) -> Callable[[Check], dict[str, Any]]:
    """Rows a second on a real shape, and what they are spent on."""

    def run(check: Check) -> dict[str, Any]:
        model, layer = check.model(SHAPES[name]["kind"], torch.bfloat16, SHAPES[name])
        site, length, n_prompts, n = (Site(layer), *((24, 4, 40) if check.tiny else (128, 32, 4000)))
        texts = _prompts(n_prompts, length, model.vocab_size)
        gib, r = check.peak(lambda: record(model, texts, [site]))
        out: dict[str, Any] = {"layer": layer, "record_GiB": gib}
        out["record_s"] = check.median(lambda: record(model, texts, [site]), 1, 0)
        for what, edits, count, how in (
            ("kl, 1 edit a token", 1, n, {"metrics": ("kl",)}),
            ("kl, 5 edits a token", 5, n, {"metrics": ("kl",)}),
            ("kl, 5 edits, chunks of 16384", 5, 4 * n, {"metrics": ("kl",), "batch_rows": 16384}),
            ("the study's five metrics, 5 edits", 5, n, {"metrics": _FIVE}),
        ):
            if check.left() < 20:
                break
            rows = _rows(r, site, count, edits)
            measure(r, site, *(x[:64] for x in rows), **how)
            gib, effects = check.peak(lambda rows=rows, how=how: measure(r, site, *rows, **how))
            t = check.median(lambda rows=rows, how=how: measure(r, site, *rows, **how), 3, 0)
            out[what] = {"rows_per_s": count / t, "GiB": gib, "path": effects.path}
            check.say(
                f"{name} block {layer} T={length} {what}: {count / t:,.0f} rows/s by {effects.path}, +{gib:.1f} GiB"
            )
        prompt, position, vectors = _rows(r, site, n, 5)
        order = np.lexsort((position.numpy(), prompt.numpy()))
        branches = Branches.single(prompt.numpy()[order], position.numpy()[order])
        put = [placed(r, site, branches.edited, vectors[torch.from_numpy(order).to(vectors.device)])]
        hidden = replayed(r, branches, put).hidden
        some = hidden[: max(1, n // 4)]
        value = torch.randn(n, 1, model.d_model, device=check.device, dtype=model.dtype)
        ids = torch.zeros(n, 1, dtype=torch.long, device=check.device)

        def dense() -> Tensor:
            with entering_at(r, site.first_block, value):
                return model.base(input_ids=ids, use_cache=False).last_hidden_state

        stages = {
            "blocks by replay": check.median(lambda: replayed(r, branches, put).hidden) / n,
            "the same attending to nothing": check.median(dense, 2) / n,
            "unembedding": check.median(lambda: unembed(r, some)) / len(some),
        }
        out["stages_us"] = {what: 1e6 * t for what, t in stages.items()}
        check.say(f"{name}, us a row: " + ", ".join(f"{what} {1e6 * t:.2f}" for what, t in stages.items()))
        if check.left() > 15:
            ids = torch.tensor(texts[:16], device=check.device)
            t = check.median(lambda: hooked_logits(model, ids, [(site, lambda x: x + 1)], length // 2), 2)
            out["hooked_rows_per_s"] = len(ids) / t
            check.say(f"{name}: hooked full forward passes, batch {len(ids)}: {len(ids) / t:,.0f} rows/s")
        if check.cuda and check.left() > 15:
            out["profile"] = profile(check, name, lambda: measure(r, site, prompt, position, vectors))
        return out

    return run


def profile(check: Check, name: str, call: Callable[[], Any]) -> dict[str, Any]:
    """Which kernels a call's time goes to, and how busy the device is."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        check.sync()
        begin = time.perf_counter()
        call()
        check.sync()
        wall = time.perf_counter() - begin
    events = found.key_averages()
    kernels = sorted(
        (e for e in events if e.self_device_time_total > 0 and not e.key.startswith(("aten::", "cuda"))),
        key=lambda e: -e.self_device_time_total,
    )
    busy = sum(e.self_device_time_total for e in kernels) / 1e6
    calls = {e.key: e.count for e in events if "Launch" in e.key or e.key.startswith("cudaStream")}
    check.say(f"{name}, profile: {wall * 1e3:.0f} ms, device busy {busy * 1e3:.0f} ms, {calls}")
    top = [(e.key[:90], e.count, e.self_device_time_total / 1e3) for e in kernels[:20]]
    for key, count, ms in top[:8]:
        print(f"      {ms:9.2f} ms {count:6d} x {key}", flush=True)
    return {"wall_s": wall, "busy_s": busy, "calls": calls, "kernels": top}


def tests(check: Check) -> dict[str, Any]:
    """The engine's own tests on the device."""
    files = [str(ROOT / "tests" / "interventions" / name) for name in (_TESTS[2:3] if check.tiny else _TESTS)]
    options = ["-q", "-p", "no:cacheprovider", "--device", check.device, "-m", "not model and not bridge"]
    workers = [] if check.tiny else ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", *options, *workers, *files]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=max(30.0, check.left()))
    lines = done.stdout.splitlines()
    (check.out / "tests.log").write_text(done.stdout + done.stderr)
    check.say(f"tests: {lines[-1] if lines else 'no output'}")
    failures = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        check.fail(f"tests: exit {done.returncode}; {len(failures)} failed, the first: {failures[:3]}")
    return {"exit": done.returncode, "last_line": lines[-1:], "failures": failures}


SECTIONS: dict[str, tuple[float, Callable[[Check], Any]]] = {
    "machine": (5, machine),
    "parity": (30, parity),
    "waits": (10, waits),
    "kl": (20, kl),
    "bench qwen3-8b": (60, bench("qwen3-8b")),
    "bench gemma2-2b": (40, bench("gemma2-2b")),
    "bench smollm2-135m": (25, bench("smollm2-135m")),
    "tests": (60, tests),
}
"""Seconds that each needs at least."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a dry run")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--out", type=Path, default=Path("results/device_check"))
    parser.add_argument("--only", nargs="*", default=[], help="first words of sections")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"device {given.device}: this torch sees no GPU; for a dry run: --device cpu --tiny", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    check = Check(given.device, given.tiny, given.seconds, given.out)
    with torch.no_grad():
        for name, (needs, section) in SECTIONS.items():
            if not given.only or name.split()[0] in given.only:
                check.run(name, 0 if given.tiny else needs, section)
    print("\n".join(["", "== device_check", *check.table]), flush=True)
    print(f"{check.out / 'device_check.json'}: {'FAILED: ' + str(len(check.failed)) if check.failed else 'ok'}")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
