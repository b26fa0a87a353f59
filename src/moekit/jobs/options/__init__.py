"""What a user may say to each job: frozen configs without torch, which recipes, `--help` and Python calls share."""
