"""The study of docs/study.md: what is trained (methods, sets, cells), how (jobs, runs), and what it shows."""
