"""One file per schedule, each with `SCHEDULE`, a `Generator`. `megapar.schedule.build` finds them."""
