"""The verb that lists networks."""

from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from zsq.models.teacher import ModelGroup, known_models


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the networks that can be named.

    Examples:
      zsq models
      zsq models resnet20
      zsq models pytorchcv:
    """

    search: Annotated[Positional[str], arg(help_behavior_hint="")] = ""
    """List the names that contain this, such as resnet20, or pytorchcv: for all of a zoo."""

    def run(self, console: Console) -> None:
        """Print them."""
        groups = known_models()
        if not self.search:
            for group in groups:
                state = "" if group.installed else "not usable here: "
                console.print(f"{group.form:26} {state}{group.reason}", soft_wrap=True)
            return
        named = [name for group in groups for name in _names(group) if self.search.lower() in name.lower()]
        for name in named:
            console.print(f"  {name}", soft_wrap=True)
        for group in groups:
            if not group.installed:
                console.print(f"not searched: {group.form}: {group.reason}", soft_wrap=True)
        if not named:
            console.print(f"no network that can be used here has '{self.search}' in its name", soft_wrap=True)


def _names(group: ModelGroup) -> list[str]:
    """Return the names of a group as MODEL is written."""
    zoo, colon, _ = group.form.partition(":")
    return [f"{zoo}:{name}" if colon else name for name in group.names]
