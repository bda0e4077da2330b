"""The verb that writes a finished run's network for another runtime."""

import json as json_format
from dataclasses import asdict, dataclass
from typing import Annotated

from rich.console import Console
from tyro.conf import OmitArgPrefixes, arg

from zsq.cli.output import print_rows, prints_to_stderr
from zsq.reports.text_tables import percent
from zsq.runs.export import ExportRequest, export_run_request
from zsq.targets import target_of


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the network of a finished run for another runtime, where its integers allow that.

    Examples:
      zsq export runs/digits --target openvino
      zsq export runs/digits --pixels nhwc --batch 1 --out camera.onnx
      zsq export runs/phone --target litert --pixels nhwc --out phone.tflite
    """

    request: Annotated[ExportRequest, arg(name=""), OmitArgPrefixes]
    json: bool = False
    """Print one JSON object."""

    def run(self, console: Console) -> None:
        """Do it and print the outcome."""
        with prints_to_stderr():
            found = export_run_request(self.request)
        if self.json:
            print(json_format.dumps(asdict(found) | {"path": str(found.path)}))
            return
        check = found.verification
        agreement = f"{percent(check.decided_agreement)} % of {check.num_decided} clear images"
        rows = [
            ("file", f"{found.path}, {found.bytes / 1024:.0f} KiB"),
            ("target", target_of(found.target).title),
            ("file against the run", f"{agreement}, {percent(check.agreement_literal)} % of all {check.num_images}"),
        ]
        if check.lowered_percent is not None:
            rows.append(("lowered to XNNPACK", f"{check.lowered_percent:.0f} % of the operators"))
        print_rows(console, rows)
