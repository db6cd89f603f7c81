"""Studies: runs of several arms and seeds, compared in pairs (docs/studies.md). Importing this needs no torch."""

# ruff: noqa: F401

from rlad_megatron.study.definition import Study, Tuned
