"""The verb that lists networks."""

from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from zsq.models.teacher import known_models


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the networks that can be named.

    Examples:
      zsq models
      zsq models resnet20
    """

    search: Annotated[Positional[str], arg(help_behavior_hint="")] = ""
    """Show zoo networks whose name contains this."""

    def run(self, console: Console) -> None:
        """Print them."""
        matches = 0
        for group in known_models():
            state = "" if group.installed else "not usable here: "
            console.print(f"{group.form:26} {state}{group.reason}", soft_wrap=True)
            if self.search and ":" in group.form:
                found = [name for name in group.names if self.search in name]
                matches += len(found)
                for name in found:
                    console.print(f"  {group.form.split(':')[0]}:{name}")
        if self.search and not matches:
            console.print(f"no zoo network that can be used here has '{self.search}' in its name")
