"""What the service is compared with. Each program is as small as its job allows, and as durable as the service."""
