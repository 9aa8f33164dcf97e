"""The scheduler in virtual time: a model of the device, work, replicas behind a router, and what is read off them."""
