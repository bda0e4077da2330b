"""Run a file on stored images by whichever runtime is there, and store its logits; for elsewhere.py.

    python benchmarks/elsewhere_run.py model.onnx images.npy logits.npy [onnxruntime | openvino | litert]

Needs numpy and the runtime alone. Prints the seconds of a run of all images, one at a time.
"""

import os
import sys
import time

import numpy as np


def main() -> None:
    """Run the file."""
    path, images_path, logits_path, runtime = (*sys.argv[1:4], *(sys.argv[4:] or ["onnxruntime"]))
    images = np.load(images_path)
    if runtime == "openvino":
        import openvino

        core = openvino.Core()
        compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})

        def run(image: np.ndarray) -> np.ndarray:
            return np.asarray(compiled([image])[0])
    elif runtime == "litert":
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(path, num_threads=1)
        interpreter.allocate_tensors()
        (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
        scale, zero_point = given["quantization"]

        def run(image: np.ndarray) -> np.ndarray:
            steps = np.rint(np.moveaxis(image, 1, -1) / np.float32(scale)) + zero_point
            interpreter.set_tensor(given["index"], steps.clip(-128, 127).astype(np.int8))
            interpreter.invoke()
            step, zero = result["quantization"]
            return np.asarray((interpreter.get_tensor(result["index"]).astype(np.float32) - zero) * np.float32(step))
    else:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (name,) = (value.name for value in session.get_inputs())

        def run(image: np.ndarray) -> np.ndarray:
            return np.asarray(session.run(None, {name: image})[0])

    run(images[:1])
    start = time.perf_counter()
    logits = np.concatenate([run(image[None]) for image in images])
    print(time.perf_counter() - start)
    np.save(logits_path, logits)


if __name__ == "__main__":
    main()
