"""What stands in front of the servers: aliases, arms, shadow copies, records of what was answered."""
