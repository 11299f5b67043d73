"""Model families: a family is a record of functions and facts."""
