"""Why attention or updates are left alone."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis, Branch, Rejected, Site
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.windows import size_text
from toma_fx.plan.plan import Rejection


def hint_no_sites(analysis: Analysis, config: MethodConfig) -> str:
    """What to try if nothing can be merged."""
    tokens = [s.segment.length for s in analysis.streams]
    unruled = (r for r in analysis.refusals.values() if r.kind == "no_rule")
    # operators are named "namespace.name", plain functions have no namespace
    custom = next((r for r in unruled if r.op.partition(".")[0] not in ("aten", r.op)), None)
    packed = ", ".join(f"{name} {length}" for name, length in analysis.packed.items())
    if tokens and max(tokens) < config.min_tokens:
        return f"lower min_tokens= (the model has at most {max(tokens)} image tokens here)"
    if custom is not None:
        return f"{custom}; toma_fx.tokenwise(...) declares that it treats every token alike"
    if config.grid is not None and not analysis.rasters:
        grid = f"{size_text(config.grid)} = {math.prod(config.grid)} tokens"
        return f"grid= ({grid}) must fit exactly one packed input ({packed or 'there is none'})"
    if not tokens and packed and not analysis.rasters:
        return f"give grid=(H, W) or (T, H, W) if one of these holds packed image tokens: {packed}"
    return "toma_fx.explain(model, example_inputs) lists every site"


def reject_branch(branch: Branch, reason: str | Rejected) -> Rejection:
    """The rejection of a branch for a reason of its own, or that of one of its nodes."""
    node, kind = (*branch.sites, branch.out)[0], "+".join(branch.kinds)
    refusal = reason if isinstance(reason, Rejected) else None
    return Rejection(node, branch.module, kind, str(reason), refusal)


def reject_site(site: Site, refusal: Rejected) -> Rejection:
    """The rejection of an attention."""
    return Rejection(site.node, site.module, site.kind, str(refusal), refusal)


_SITE_REASONS = {
    "text": "its queries carry no image tokens",
    "temporal": "tokens are its batch; it works on each token alone",
    "unknown": "no image tokens reach it",
}


def reject_rest(
    analysis: Analysis, flow: Flow, merged: Set[str], rejections: Sequence[Rejection]
) -> list[Rejection]:
    """Rejections of the attention that is neither merged nor rejected, and of updates cut off."""
    known = merged | {r.node for r in rejections}
    branches = {site: b for s in analysis.streams for b in s.branches for site in b.sites}
    out = []
    for site in analysis.sites:
        if site.node in known:
            continue
        refusal = None
        if site.node in branches:
            reason = f"left alone with {branches[site.node].sites[0]} of the same branch"
        else:
            reason = _SITE_REASONS.get(site.kind, "not part of a residual branch")
            refusal = _nearest_refusal(flow, site.node, back=site.kind == "unknown")
            if refusal is not None:
                reason = f"{reason}; {refusal}"
        out.append(Rejection(site.node, site.module, site.kind, reason, refusal))
    causes = {r.cause for r in (*rejections, *out)}
    return out + [r for r in _reject_lost_updates(flow) if r.cause not in causes]


def _reject_lost_updates(flow: Flow) -> list[Rejection]:
    """Updates of image tokens that an op without a rule is part of."""
    lost: dict[str, Rejected] = {}
    out = []
    for name in flow.order:
        operands = flow.operands[name]
        if name in flow.refusals:
            if any(s.grid for o in operands for s in flow.segments(o)):
                lost[name] = flow.refusals[name]
        elif not flow.segments(name):
            if refusal := next((lost[o] for o in operands if o in lost), None):
                lost[name] = refusal
        elif name in flow.sums and flow.is_embedding(name):
            for update in (o for o in operands if o in lost):
                refusal, module = lost[update], flow.modules[update]
                out.append(Rejection(update, module, "other", str(refusal), refusal))
    return out


def _nearest_refusal(flow: Flow, node: str, *, back: bool) -> Rejected | None:
    """The refusal that ended the flow of tokens at, before (`back`) or after an attention."""
    seen, front = {node}, [node]
    while front:
        for name in front:
            if name in flow.refusals:
                return flow.refusals[name]
            if name in flow.needs_all_tokens:
                return flow.needs_all_tokens[name]
        edges = flow.operands if back else flow.users
        front = [n for f in front for n in edges[f] if n not in seen]
        seen.update(front)
    return None
