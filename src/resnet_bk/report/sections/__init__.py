"""One module for each section of the report; each turns one result into blocks."""
