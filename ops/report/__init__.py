"""Self-contained HTML pages about one run or two: scores, pictures, rows side by side."""
