"""Convolutions of packed weights."""
