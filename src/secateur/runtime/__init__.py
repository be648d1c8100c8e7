"""Runs an exported folder with tokenizers, NumPy and ONNX Runtime or OpenVINO alone: no torch, no transformers.

    from secateur import runtime

    encoder = runtime.load("exported")
    vectors = encoder.encode(["a text", "another"], prompt_name="query")

``pip install 'secateur[runtime]'`` brings what it needs for ONNX exports, ``pip install secateur openvino`` for
OpenVINO's. Nothing of secateur that needs more is imported here.
"""

from __future__ import annotations

from secateur.runtime.encoder import ExportEncoder as Encoder
from secateur.runtime.encoder import load

__all__ = ["Encoder", "load"]
