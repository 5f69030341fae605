"""The RabbitMQ broker: connections, publishing, consuming, dead letters. All use of aio-pika is in this room."""
