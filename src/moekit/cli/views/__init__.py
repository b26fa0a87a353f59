"""How the results of each job are printed."""
