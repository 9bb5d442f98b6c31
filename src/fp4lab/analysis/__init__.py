"""From run folders to answers: data frames, tables, plots. Reads files only; no torch."""
