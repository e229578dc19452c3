"""Reports about runs that are over, or not yet: from the files in their directories, and nothing else."""
