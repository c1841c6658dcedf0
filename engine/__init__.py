"""Riskforge: manufactures labelled images on which a classifier fails or hesitates."""

__version__ = "0.1.0"
