"""Tiny configurations of the denoisers of diffusers: `CASES`, one `Case` each."""

from tests.zoo import flux_like, images, unets, videos

CASES = (*unets.CASES, *images.CASES, *flux_like.CASES, *videos.CASES)
