"""Why attention or updates are left alone."""

from __future__ import annotations

import math

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis, Branch, Rejected
from toma_fx.analysis.labels import BATCH, Tokens
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.windows import size_text
from toma_fx.plan.plan import Rejection

NO_RULE = "no transfer rule for"


def _no_sites_hint(analysis: Analysis, config: MethodConfig) -> str:
    tokens = [s.segment.length for s in analysis.streams]
    unruled = [r.reason for r in analysis.refusals.values() if r.reason.startswith(NO_RULE)]
    named = (r for r in unruled if "." in r.removeprefix(NO_RULE).split("(")[0])
    custom = next((r for r in named if not r.startswith(f"{NO_RULE} aten.")), None)
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


def _rejection(branch: Branch, reason: str) -> Rejection:
    return Rejection((*branch.sites, branch.out)[0], branch.module, "+".join(branch.kinds), reason)


_SITE_REASONS = {
    "text": "its queries carry no image tokens",
    "temporal": "tokens are its batch; it works on each token alone",
    "unknown": "no image tokens reach it",
}


def _left_alone(
    analysis: Analysis, flow: Flow, merged: set[str], rejections: list[Rejection]
) -> list[Rejection]:
    """Attention that is in no segment and has no reason yet."""
    known = merged | {r.node for r in rejections}
    branches = {site: b for s in analysis.streams for b in s.branches for site in b.sites}
    out = []
    for site in analysis.sites:
        if site.node in known:
            continue
        if site.node in branches:
            reason = f"left alone with {branches[site.node].sites[0]} of the same branch"
        else:
            reason = _SITE_REASONS.get(site.kind, "not part of a residual branch")
            if site.segment and _tokens_first(flow, site.segment):
                reason += " laid out [batch, tokens, channels]: the tokens come first"
            refusal = _nearest_refusal(flow, site.node, back=site.kind == "unknown")
            reason += f"; {refusal.node}: {refusal.reason}" if refusal else ""
        out.append(Rejection(site.node, site.module, site.kind, reason))
    told = [r.reason for r in (*rejections, *out)]
    lost = ((r, r.reason.partition(" ")[0]) for r in _lost_updates(flow))
    return out + [r for r, node in lost if not any(node in reason for reason in told)]


def _tokens_first(flow: Flow, segment: str) -> bool:
    """Whether what is added up is laid out [tokens, batch, channels]."""
    layouts = (flow.layout(n) for n in flow.carriers(segment) if n in flow.sums)
    return any(x is not None and x[1:2] == (BATCH,) and isinstance(x[0], Tokens) for x in layouts)


def _lost_updates(flow: Flow) -> list[Rejection]:
    """Updates of image tokens that an op without a rule is part of."""
    lost: dict[str, Rejected] = {}
    out = []
    for name in flow.order:
        operands = flow.operands[name]
        if name in flow.refusals:
            if any(s.grid for o in operands for s in flow.segments(o)):
                lost[name] = flow.refusals[name]
        elif not flow.segments(name):
            if found := next((lost[o] for o in operands if o in lost), None):
                lost[name] = found
        elif name in flow.sums and flow.is_embedding(name):
            for update in (o for o in operands if o in lost):
                reason = f"{lost[update].node}: {lost[update].reason}"
                out.append(Rejection(update, flow.modules[update], "other", reason))
    return out


def _nearest_refusal(flow: Flow, node: str, *, back: bool) -> Rejected | None:
    """The refusal that ended the flow of tokens at, before (`back`) or after an attention."""
    seen, front = {node}, [node]
    while front:
        for name in front:
            if name in flow.refusals:
                return flow.refusals[name]
            if name in flow.whole:
                return Rejected(name, flow.whole[name])
        edges = flow.operands if back else flow.users
        front = [n for f in front for n in edges[f] if n not in seen]
        seen.update(front)
    return None
