"""Recognisers: windows in, hypotheses out."""
