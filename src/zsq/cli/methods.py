"""The verb that lists methods, quantizers and their settings."""

from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, arg

from zsq.errors import unknown_name
from zsq.methods import METHODS
from zsq.quantization import QUANTIZERS
from zsq.runs.docstrings import settings_of


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the methods and quantizers, or the settings of one.

    Examples:
      zsq methods
      zsq methods zscgan
    """

    name: Annotated[Positional[str | None], arg(help_behavior_hint="")] = None
    """Method or quantizer whose settings are shown."""

    def run(self, console: Console) -> None:
        """Print them."""
        known: dict[str, Any] = {**METHODS, **QUANTIZERS}
        if self.name is None:
            rows = [("--method", name, kind.summary) for name, kind in METHODS.items()]
            rows += [("--quantizer", name, (kind.__doc__ or "").splitlines()[0]) for name, kind in QUANTIZERS.items()]
            for option, name, text in rows:
                console.print(f"{option:12} {name:17} {text}", soft_wrap=True)
            return
        if self.name not in known:
            raise unknown_name("method or quantizer", self.name, known)
        section = "method" if self.name in METHODS else "quantizer"
        for setting, default, text in settings_of(known[self.name]):
            line = f"--set {section}.{setting}={default}"
            console.print(f"{line:52} {text}", soft_wrap=True)
