"""`rk-export serve`: bundles behind OpenAI's HTTP interface and the Open Inference Protocol; extra ``serve``."""

from __future__ import annotations
