"""Where attention can weigh merged keys by the number of tokens they stand for, and why not."""

from __future__ import annotations

from collections.abc import Mapping

from toma_fx.analysis.dataflow import Flow, is_batch
from toma_fx.analysis.facts import Branch, Rejected, Site
from toma_fx.methods.setting import Setting

IMAGE_KEYS = ("self", "joint")
"""Kinds of attention whose keys hold the image."""


def refuse_key_sizes(
    branch: Branch, setting: Setting, sites: Mapping[str, Site], flow: Flow
) -> Rejected | str | None:
    """Why the merged keys of a branch can't be weighed by their sizes; None if they can."""
    attending = [sites[name] for name in branch.sites if sites[name].kind in IMAGE_KEYS]
    if attending and type(setting).sizes is Setting.sizes:
        return "proportional=True: the method does not say how many tokens a merged one is of"
    for site in attending:
        if not site.operands:
            reason = "proportional=True: attention is written out, not one fused operator"
            return flow.reject(site.node, reason, "content")
        layout = flow.layout(site.operands[0]) or ()
        if not layout or not is_batch(layout[0]):
            reason = "proportional=True: its first dimension is not the batch"
            return flow.reject(site.node, reason, "layout")
    return None


def refuse_sums(branch: Branch, setting: Setting, flow: Flow) -> str | None:
    """Why a branch that sums over tokens without softmax can't be merged; None if it can."""
    if type(setting).sizes is not Setting.sizes or flow.sums_of_tokens.isdisjoint(branch.nodes):
        return None
    return "it sums over tokens, and the method does not say how many tokens a merged one is of"
