"""The command line of each script: its groups of flags, its rules, and the flags that it lacks."""
