"""Speed of the training engine compared with others: `python -m bench.train`. Not part of the installed packages."""
