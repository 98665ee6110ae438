"""Speed of the training engine beside that of others: `python -m bench.train`. Not part of the installed packages."""
