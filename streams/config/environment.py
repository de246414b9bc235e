"""Variables of the environment that look like settings and are none: those that Kubernetes injects.

For each Service of a namespace, Kubernetes puts the Service's address into the environment of every container, under
the Service's name in capitals. A Service named `streamformer` or `streamformer-web` therefore collides with the prefix
of the settings, and `STREAMFORMER_WEB_PORT` of such a Service even with a setting. Its value, a URL, tells them apart.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

PREFIX = "STREAMFORMER_"

_NAMES = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)


def is_injected(name: str, value: str) -> bool:
    """Return whether Kubernetes injects this variable for a Service whose name begins with `streamformer`.

    >>> is_injected("STREAMFORMER_SERVICE_HOST", "10.0.0.1"), is_injected("STREAMFORMER_WEB_PORT", "tcp://10.0.0.1:80")
    (True, True)
    >>> is_injected("STREAMFORMER_WEB_PORT", "9464"), is_injected("PATH", "/bin")
    (False, False)
    """
    upper = name.upper()
    if not upper.startswith(PREFIX):
        return False
    rest = upper.removeprefix(PREFIX.rstrip("_"))
    return bool(_NAMES.search(rest) or (rest.endswith("_PORT") and _ADDRESS.match(value)))


def injected_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that Kubernetes has injected and that are ignored."""
    return sorted(name for name, value in environ.items() if is_injected(name, value))


def did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
    """Return the end of an error message that names the most similar known name; empty if none is similar.

    A common `prefix` is left out of the comparison, because it would make all names similar.

    >>> did_you_mean("web.prot", ["web.host", "web.port"])
    '; did you mean web.port?'
    """
    names = [each.removeprefix(prefix) for each in known]
    nearest = difflib.get_close_matches(name.removeprefix(prefix), names, n=1, cutoff=0.7)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""
