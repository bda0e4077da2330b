"""The verb that quantizes a network."""

import json as json_format
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from tyro.conf import OmitArgPrefixes, arg

from zsq.cli.output import print_rows, prints_to_stderr
from zsq.reports.html import REPORT
from zsq.runs.quantize import quantize_request
from zsq.runs.request import QuantizeRequest
from zsq.runs.summary import summary_rows
from zsq.runtime import distributed


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize a network without its training data and write verified files.

    Examples:
      zsq quantize digits --budget 1m --data digits --out runs/digits
      zsq quantize digits --bits 4 --from runs/digits --out runs/digits4
      zsq quantize pytorchcv:resnet18 --data imagenet/val --out runs/r18
      zsq quantize net.py:build --weights net.pth --input 3x32x32 --classes 10 \\
          --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --quantizer qat --bits W4A8 \\
          --budget 10m --data test.npz --out runs/net
    """

    request: Annotated[QuantizeRequest, arg(name=""), OmitArgPrefixes]
    devices: Annotated[int, arg(metavar="N")] = 1
    """Processes on this machine that share the training, one a GPU; torchrun sets its own number."""
    json: bool = False
    """Print the record as one JSON object."""

    def run(self, console: Console) -> None:
        """Do it and print the outcome."""
        with prints_to_stderr():
            result = quantize_request(self.request)
        if not distributed.is_main():
            return
        if self.json:
            print(json_format.dumps(result.record.as_dict()))
            return
        paths = ("folder", str(result.folder)), ("report", str(result.folder / REPORT))
        print_rows(console, (*summary_rows(result.record), *paths))
