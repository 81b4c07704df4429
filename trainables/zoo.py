"""The head zoo without its tensors: what each head is called and costs, and which cannot be."""

from typing import Any, NamedTuple

KNOTS = 32  # pieces of the monotone function
BASELINES = ("own", "svd", "svd-weighted")  # of a frozen backbone: heads that nobody trains


def label(head: dict[str, Any]) -> str:
    """What to call it: full, low-rank, mos-4, backward-8-own, ..."""
    if head["kind"] == "linear":
        return "low-rank" if head["rank"] else "full"
    if head["kind"] == "backward":
        return f"backward-{head['backward']}-{head['directions']}"
    return f"mos-{head['experts']}" if head["kind"] == "mos" else head["kind"]


def impossible(head: dict[str, Any], d: int, tied: bool) -> str | None:
    """Why there is no such head on hidden states of size d, or None."""
    rank, kind = head["rank"], head["kind"]
    if rank and tied:
        return f"rank {rank} left out where model.tied: a tied head is full"
    if (kind, head["init"]) in (("mlp", "svd"), ("mlp", "normal"), ("mos", "normal")):
        return f"{kind} left out at init {head['init']}: it is not one W, or one A B"
    if kind in ("mos", "mlp") and tied:
        return f"{kind} left out where model.tied: it has no W of its own to tie"
    if rank and rank > d:
        return f"rank {rank} left out at d = {d}: no head has a rank above d"
    if kind == "mlp" and (rank or 1) < 2:
        return f"mlp left out at rank {rank or 'full'}: it needs a rank of 2 or more"
    if kind == "backward" and rank:
        return f"backward left out at rank {rank}: its head is full"
    if kind == "backward" and head["backward"] > d:
        return f"backward {head['backward']} left out at d = {d}: there are no more directions"
    return None


class HeadCost(NamedTuple):
    """Of a head, for the plan."""

    params: int
    products: int
    """Multiply-adds a token, forward."""


def cost(head: dict[str, Any], vocabulary: int, d: int) -> HeadCost:
    """In closed form."""
    r = head["rank"] or d
    if head["kind"] == "mos":
        k = head["experts"]
        return HeadCost(vocabulary * r + k * r * d + k * d, k * (vocabulary * r + r * d + d))
    if head["kind"] == "mlp":
        m = mlp_width(vocabulary, d, r)
        small = (r - 1) * (vocabulary + m) + m * d
        return HeadCost(small, small)
    linear = r * (vocabulary + d) if head["rank"] else vocabulary * d
    return HeadCost(linear + (KNOTS if head["kind"] == "monotone" else 0), linear)


def mlp_width(vocabulary: int, d: int, rank: int) -> int:
    return (vocabulary + rank * d) // (d + rank - 1)
