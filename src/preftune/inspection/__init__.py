"""What a stage sees of a row, what a policy did token by token, and what is wrong with a file of rows."""
