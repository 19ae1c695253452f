"""Commands in a network of their own, for Ray.

Ray replaces 127.0.0.1 by the machine's own address and listens there.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest


def without_network() -> list[str]:
    """What runs a command in a network of its own, which has the loopback alone.

    All processes that it starts end with it.
    """
    script = 'ip link set lo up && exec "$@"'
    for flags in ("-n", "-rn"):
        words = ["unshare", f"{flags}pf", "--kill-child", "--mount-proc"]
        words += ["bash", "-c", script, "bash"]
        if shutil.which("unshare") and not subprocess.run([*words, "true"]).returncode:
            return words
    pytest.skip("no network namespace can be made (unshare -n), so that Ray would be reachable")
