"""What gradstats costs, measured beside other ways. Every script says in its first lines what and how."""
