"""Methods that look at data, one file each: experts and batches to a model, or to a routed one."""
