"""Checkpoints: the reference's `.dat` container and Hugging Face folders."""

from fp4lab.checkpoint.dat import DatError, DatFile, write_dat
from fp4lab.checkpoint.hf import HfDirectory
from fp4lab.checkpoint.load import check_path, open_weights, save_dat, wide_scales
from fp4lab.checkpoint.weights import FileInfo, Weights

__all__ = [
    "DatError",
    "DatFile",
    "FileInfo",
    "HfDirectory",
    "Weights",
    "check_path",
    "open_weights",
    "save_dat",
    "wide_scales",
    "write_dat",
]
