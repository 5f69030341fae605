"""The RabbitMQ broker: connections, publishing, consuming, dead letters. Only this room uses aio-pika."""
