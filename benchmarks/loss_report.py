"""What benchmarks/losses.py has measured, against the bars, and as tables in Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loss_jobs import NEEDS_NO_TEACHER, PEER_TASKS, SAMPLES_24, TOP_50, own_jobs

from stillroom.losses.config import LOSSES

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Bar:
    what: str
    measured: float
    bar: float
    strictly: bool = field(default=False, repr=False)
    at_least: bool = field(default=False, repr=False)

    @property
    def met(self) -> bool:
        if self.at_least:
            return self.measured >= self.bar
        return self.measured < self.bar if self.strictly else self.measured <= self.bar

    def row(self) -> str:
        sign = "≥" if self.at_least else "<" if self.strictly else "≤"
        return f"| {self.what} | {self.measured:.3g} | {sign} {self.bar:g} | {'met' if self.met else '**missed**'} |"


def other_kinds() -> list[str]:
    return [name for name in LOSSES if name not in ("forward_kl", NEEDS_NO_TEACHER)]


def bars(result: dict[str, Any]) -> Iterable[Bar]:
    for vocabulary, time_ in result.get("time", {}).items():
        yield from time_bars(time_["of"], "cpu_s", 1.10, f"CPU time, {int(vocabulary):,} columns")
    if "memory" in result:
        where = f"extra memory, {result['memory']['vocabulary']:,} columns"
        yield from memory_bars(result["memory"]["of"], where)
        growth = [beyond_gradients(x) for x in result["memory growth"]["of"].values() if "failed" not in x]
        yield Bar("extra memory beyond gradients, most tokens of fewest", max(growth) / growth[0], 1.05)
    if "gradient error" in result:
        for dtype, bar in (("float32", 1e-5), ("bfloat16", 1e-2)):
            errors = {
                name: of_loss[f"{dtype}, teacher of its own"] for name, of_loss in result["gradient error"].items()
            }
            worst = max(errors, key=errors.__getitem__)
            yield Bar(f"gradient error against float64, {dtype}, worst: {worst}", errors[worst], bar)
        least = min(min(of_loss.values()) for of_loss in result["smallest value"].values())
        yield Bar("smallest value of any loss, teacher close to student", least, 0.0, at_least=True)
    if "gpu" in result:
        gpu = result["gpu"]
        yield from time_bars(gpu["time"]["of"], "device_s", 1.15, f"time on {gpu['device']}")
        extra = max(
            x["extra_bytes"] - x["of which gradient_bytes"] for name, x in gpu["memory"].items() if name in LOSSES
        )
        yield Bar("extra GiB beyond gradients on the GPU, any loss", extra / GIB, 1.0)
        yield Bar(
            "extra GiB with gradients on the GPU, forward_kl", gpu["memory"]["forward_kl"]["extra_bytes"] / GIB, 1.0
        )


def time_bars(of: dict[str, Any], measure: str, bar: float, where: str) -> Iterable[Bar]:
    yield Bar(f"{where}: forward_kl of the four products", of["forward_kl"][f"{measure} of four"], bar)
    for task in PEER_TASKS:
        peers = {name: x[measure] for name, x in of.items() if name.endswith((f" {task}", f" {task} compiled"))}
        if task in of and peers:
            best = min(peers, key=peers.__getitem__)
            ratio = 1 / of[best][f"{measure} of {task}"]
            yield Bar(f"{where}: {task} of the fastest peer, {best}", ratio, 1.0, strictly=True)
    others = {name: of[name][f"{measure} of forward_kl"] for name in other_kinds()}
    slowest = max(others, key=others.__getitem__)
    yield Bar(f"{where}: slowest other loss, {slowest}, of forward_kl", others[slowest], 1.25)
    for name in (TOP_50, SAMPLES_24):
        yield Bar(f"{where}: {name} of cross_entropy", of[name][f"{measure} of cross_entropy"], 1.05)


def beyond_gradients(x: dict[str, Any]) -> float:
    return x["extra_bytes"] - x["of which gradient_bytes"]


def memory_bars(of: dict[str, Any], where: str) -> Iterable[Bar]:
    extra = {name: x["extra_bytes"] for name, x in of.items() if "failed" not in x}
    mine = extra["forward_kl"]
    if "naive forward_kl" in extra:
        yield Bar(f"{where}: forward_kl of naive", mine / extra["naive forward_kl"], 0.1)
        best = min((name for name in extra if name not in own_jobs()), key=extra.__getitem__)
        yield Bar(f"{where}: forward_kl of the smallest peer, {best}", mine / extra[best], 1.0, strictly=True)
    others = [extra[name] for name in other_kinds()]
    yield Bar(f"{where}: largest other loss of forward_kl", max(others) / mine, 1.05)


def markdown(result: dict[str, Any]) -> str:
    lines = ["", "| | measured | bar | |", "|---|---|---|---|", *(bar.row() for bar in bars(result))]
    times = dict(result.get("time", {}))
    if "gpu" in result:
        times["gpu"] = result["gpu"]["time"]
    for where, time_ in times.items():
        measures = [m for m in ("cpu_s", "wall_s", "device_s") if m in time_["of"]["four"]]
        of_memory = result["gpu"]["memory"] if where == "gpu" else {}
        if str(result.get("memory", {}).get("vocabulary")) == where:
            of_memory = result["memory"]["of"]
        title = "GPU" if where == "gpu" else f"{int(where):,} columns"
        heads = [
            title,
            *(f"{m}{of}" for m in measures for of in ("", " of four", " of forward_kl")),
            "extra MiB",
            "of which gradients",
        ]
        lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name, x in time_["of"].items():
            cells = [f"{x[m + of]:.3f}" for m in measures for of in ("", " of four", " of forward_kl")]
            m = of_memory.get(name, {})
            mib = [f"{m[key] / MIB:.0f}" if key in m else "" for key in ("extra_bytes", "of which gradient_bytes")]
            lines.append("| " + " | ".join([name, *cells, *mib]) + " |")
    if "memory growth" in result:
        of = result["memory growth"]["of"]
        lines += ["", "Growth, MiB beyond gradients: " + ", ".join(
            f"{int(n):,} tokens {beyond_gradients(x) / MIB:.0f}" for n, x in of.items() if "failed" not in x
        )]  # fmt: skip
    if "gradient error" in result:
        keys = list(next(iter(result["gradient error"].values())))
        lines += ["", "| gradient error | " + " | ".join(keys) + " | smallest value |", "|---" * (len(keys) + 2) + "|"]
        for name, x in result["gradient error"].items():
            least = min(result["smallest value"][name].values())
            lines.append(f"| {name} | " + " | ".join(f"{x[key]:.1e}" for key in keys) + f" | {least:.1e} |")
    return "\n".join([*lines, *result["not measured"]])
