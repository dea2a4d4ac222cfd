"""From report.json to a PDF and an HTML page. Reads JSON only: reports can be made anywhere, long after measuring."""
