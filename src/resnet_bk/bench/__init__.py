"""Measurements, one module a section; ``suite`` runs them and writes report.json."""
