"""The same recipe at several seeds, pooled: does tuning raise the gold score, and by how much?

`design` says what every seed runs, `seed` runs and `measure` measures one, `pool` puts them together, `page`
and `figures` show it, `launch` is the whole. `tasks` hands seeds out: to `here`, `on_slurm`, `on_ray`.
"""
