"""What the files are that flags name: looked at before anything is built, without torch."""
