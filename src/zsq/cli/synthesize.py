"""The verb that writes synthetic images."""

from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from tyro.conf import OmitArgPrefixes, arg

from zsq.cli.output import prints_to_stderr
from zsq.runs.request import SynthesizeRequest
from zsq.runs.synthesize import synthesize_request
from zsq.runtime import distributed


@dataclass(frozen=True, kw_only=True)
class Synthesize:
    """Write synthetic images for use in any tool: an .npz (images, labels) and a picture with one row a class.

    Examples:
      zsq synthesize digits --method zscgan --count 1000 --budget 1m --out images
      zsq synthesize digits --from runs/digits --count 10000 --out images
    """

    request: Annotated[SynthesizeRequest, arg(name=""), OmitArgPrefixes]
    devices: Annotated[int, arg(metavar="N")] = 1
    """Processes on this machine that share the training, one a GPU; torchrun sets its own number."""

    def run(self, console: Console) -> None:
        """Do it and print the outcome."""
        with prints_to_stderr():
            written = synthesize_request(self.request)
        for path in written if distributed.is_main() else ():
            console.print(str(path), soft_wrap=True)
