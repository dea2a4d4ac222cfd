"""From report.json to a PDF. Reads JSON only: a report can be made anywhere, long after the measurement."""
