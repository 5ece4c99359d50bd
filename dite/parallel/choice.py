"""`mode="auto"`: the fastest way to draw an image within an error bound, among all modes, codecs and degrees. One device, when that is fastest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dite.errors import UsageError
from dite.parallel.cost import NO_COST, CodecSpeed, Prediction, image_seconds, predict
from dite.parallel.document import check_int, check_number
from dite.parallel.rates import parse_codec
from dite.parallel.topology import STALE
from dite.parallel.traffic import MODES, ONE_DEVICE, Layout, check
from dite.parallel.workload import Link, Workload


@dataclass(frozen=True)
class Choice:
    """The chosen `layout`; seconds of an image with it, and on one device; a step of it (not the first); its error; the `reason` in words; and all
    that was considered within the error bound, as (seconds of an image, layout), the fastest first.
    """

    layout: Layout
    seconds: float
    one_device_s: float
    step: Prediction
    error: float
    reason: str
    considered: tuple[tuple[float, Layout], ...]


@dataclass(frozen=True)
class Terms:
    """`steps` of an image, the `speeds` of codecs, and whether CFG may be spread over two groups."""

    steps: int = 50
    speeds: Mapping[str, CodecSpeed] = field(default_factory=lambda: NO_COST)
    cfg: bool = True


def choose(
    workload: Workload, link: Link, ranks_available: int, error_bound: float, codec_errors: Mapping[str, float], terms: Terms | None = None
) -> Choice:
    """The fastest layout on at most `ranks_available` ranks whose error is at most `error_bound`; fewer ranks win a tie.

    `codec_errors` are measured relative errors of the result, by `"int4"` for a codec in any synchronous mode and `"ulysses:int4"` for one mode
    alone. Nothing unmeasured is chosen: stale modes (displaced, pipefusion) are considered only under names of their own, as `"displaced:none"`.
    Synchronous modes with codec none err by nothing, and needn't be given.
    """
    terms = terms or Terms()
    check_int(ranks_available, 1, 4096, "ranks_available")
    check_number(error_bound, 0.0, 1e6, "error_bound")
    _check_names(codec_errors)
    errors = {layout: error for layout, error in _layouts(workload, ranks_available, codec_errors, terms.cfg) if error <= error_bound}
    timed = [(image_seconds(workload, link, layout, terms.steps, terms.speeds), layout) for layout in errors]
    timed.sort(key=lambda one: (one[0], one[1].ranks, errors[one[1]], str(one[1])))
    seconds, best = timed[0]
    single_s = next(time for time, layout in timed if layout.ranks == 1)
    others = [one for one in timed if one[1].ranks > 1]
    step = predict(workload, link, best, False, terms.speeds)
    return Choice(best, seconds, single_s, step, errors[best], _reason(best, step, (seconds, single_s), others), tuple(timed))


def _layouts(workload: Workload, most: int, codec_errors: Mapping[str, float], cfg: bool) -> Iterator[tuple[Layout, float]]:
    """Every layout that the workload allows and whose error is known."""
    codecs = dict.fromkeys(["none", *(name.rpartition(":")[2] for name in codec_errors)])
    for ranks in range(1, most + 1):
        for halves in (False, True) if cfg else (False,):
            for mode in MODES:
                for codec in codecs if mode != ONE_DEVICE else ("none",):
                    error = 0.0 if mode == ONE_DEVICE else _error(mode, codec, codec_errors)
                    if error is None:
                        continue
                    try:
                        layout = Layout(mode, codec, ranks, halves)
                        check(workload, layout)
                    except UsageError:  # an impossible split, of which there are many
                        continue
                    yield layout, error


def _error(mode: str, codec: str, codec_errors: Mapping[str, float]) -> float | None:
    own = codec_errors.get(f"{mode}:{codec}")
    if own is not None or mode in STALE:
        return own
    return codec_errors.get(codec, 0.0 if codec == "none" else None)


def _check_names(codec_errors: Mapping[str, float]) -> None:
    for name, error in codec_errors.items():
        mode, colon, codec = name.rpartition(":")
        parse_codec(codec)
        if colon:
            Layout(mode, ranks=1 if mode == ONE_DEVICE else 2)
        check_number(error, 0.0, 1e6, f"the error of {name}")


def _reason(best: Layout, step: Prediction, times: tuple[float, float], others: list[tuple[float, Layout]]) -> str:
    seconds, single_s = times
    if best.ranks > 1:
        waits = f"{step.exposed_s:.3g} s of a step's {step.seconds:.3g} s wait for the link"
        return f"{best} takes {seconds:.3g} s an image, one device {single_s:.3g} s; {waits}"
    if not others:
        return f"one device: no other layout is possible within the ranks and the error bound ({single_s:.3g} s an image)"
    return f"one device is fastest: {single_s:.3g} s an image; the best of {len(others)} others, {others[0][1]}, takes {others[0][0]:.3g} s"
