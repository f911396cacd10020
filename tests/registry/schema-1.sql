BEGIN TRANSACTION;
CREATE TABLE alias (
	name TEXT NOT NULL, 
	alias TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	PRIMARY KEY (name, alias), 
	CONSTRAINT alias_of_version FOREIGN KEY(name, number) REFERENCES version (name, number)
);
INSERT INTO "alias" VALUES('medical-qa','champion',1);
INSERT INTO "alias" VALUES('medical-qa','staging',3);
CREATE TABLE event (
	id INTEGER NOT NULL, 
	at TEXT NOT NULL, 
	who TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	name TEXT NOT NULL, 
	alias TEXT NOT NULL, 
	old INTEGER, 
	new INTEGER, 
	why TEXT NOT NULL, 
	overridden TEXT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "event" VALUES(1,'2026-11-28T12:42:54Z','tester','add','medical-qa','',NULL,1,'','');
INSERT INTO "event" VALUES(2,'2026-11-28T12:42:54Z','tester','export','medical-qa','',NULL,1,'vllm','');
INSERT INTO "event" VALUES(3,'2026-11-28T12:42:54Z','tester','score','medical-qa','',NULL,1,'heldout','');
INSERT INTO "event" VALUES(4,'2026-11-28T12:42:54Z','tester','score','medical-qa','',NULL,1,'medqa','');
INSERT INTO "event" VALUES(5,'2026-11-28T12:42:55Z','tester','add','medical-qa','',NULL,2,'','');
INSERT INTO "event" VALUES(6,'2026-11-28T12:42:55Z','tester','export','medical-qa','',NULL,2,'vllm','');
INSERT INTO "event" VALUES(7,'2026-11-28T12:42:55Z','tester','score','medical-qa','',NULL,2,'heldout','');
INSERT INTO "event" VALUES(8,'2026-11-28T12:42:55Z','tester','score','medical-qa','',NULL,2,'medqa','');
INSERT INTO "event" VALUES(9,'2026-11-28T12:42:55Z','tester','add','medical-qa','',NULL,3,'','');
INSERT INTO "event" VALUES(10,'2026-11-28T12:42:55Z','tester','export','medical-qa','',NULL,3,'vllm','');
INSERT INTO "event" VALUES(11,'2026-11-28T12:42:55Z','tester','score','medical-qa','',NULL,3,'heldout','');
INSERT INTO "event" VALUES(12,'2026-11-28T12:42:55Z','tester','score','medical-qa','',NULL,3,'medqa','');
INSERT INTO "event" VALUES(13,'2026-11-28T12:42:55Z','tester','promote','medical-qa','champion',NULL,1,'first','');
INSERT INTO "event" VALUES(14,'2026-11-28T12:42:56Z','tester','promote','medical-qa','champion',1,2,'','');
INSERT INTO "event" VALUES(15,'2026-11-28T12:42:56Z','tester','rollback','medical-qa','champion',2,1,'worse','');
INSERT INTO "event" VALUES(16,'2026-11-28T12:42:56Z','tester','promote','medical-qa','staging',NULL,3,'','');
CREATE TABLE export (
	name TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	label TEXT NOT NULL, 
	target TEXT NOT NULL, 
	quant TEXT, 
	bytes BIGINT NOT NULL, 
	unproven TEXT NOT NULL, 
	manifest TEXT NOT NULL, 
	PRIMARY KEY (name, number, label), 
	CONSTRAINT export_of_version FOREIGN KEY(name, number) REFERENCES version (name, number)
);
INSERT INTO "export" VALUES('medical-qa',1,'vllm','vllm',NULL,43,'','{
  "format": 1,
  "lora2serve": "0.1.0",
  "target": "vllm",
  "name": "model",
  "run": "run-0",
  "base": {
    "id": "org/base",
    "fingerprint": {
      "config": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
      "tensors": "6f72672f62617365000000000000000000000000000000000000000000000000"
    }
  },
  "adapter": {
    "path": "/home/user/run-0/adapter",
    "sha256": {
      "adapter_config.json": "ae9ca2f38cd27b4e2b49dbe226041641132e52ea567a64da28482ff6bc902bb7",
      "adapter_model.safetensors": "16e76767cf01d04b40551bed6b1ef90f1afcb649967e5539a3fa6c2efa31f6a8"
    }
  },
  "adapters": [
    {
      "path": "/home/user/run-0/adapter",
      "sha256": {
        "adapter_config.json": "ae9ca2f38cd27b4e2b49dbe226041641132e52ea567a64da28482ff6bc902bb7",
        "adapter_model.safetensors": "16e76767cf01d04b40551bed6b1ef90f1afcb649967e5539a3fa6c2efa31f6a8"
      }
    }
  ],
  "files": {
    "config.json": {
      "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
      "size": 2
    },
    "serve.yaml": {
      "sha256": "fe231a44c76517c7431334e7b54e565a706190dd7fd6687549c28f93f19f58c8",
      "size": 41
    }
  },
  "parity": {
    "met": true,
    "engines": {
      "vllm": {
        "status": "met"
      }
    }
  }
}
');
INSERT INTO "export" VALUES('medical-qa',2,'vllm','vllm',NULL,43,'','{
  "format": 1,
  "lora2serve": "0.1.0",
  "target": "vllm",
  "name": "model",
  "run": "run-1",
  "base": {
    "id": "org/base",
    "fingerprint": {
      "config": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
      "tensors": "6f72672f62617365000000000000000000000000000000000000000000000000"
    }
  },
  "adapter": {
    "path": "/home/user/run-1/adapter",
    "sha256": {
      "adapter_config.json": "ae9ca2f38cd27b4e2b49dbe226041641132e52ea567a64da28482ff6bc902bb7",
      "adapter_model.safetensors": "ed1777e6ead37218a7bdc439582d1e42ed74a5c41ccf5038aec0d901fc5bdb3b"
    }
  },
  "adapters": [
    {
      "path": "/home/user/run-1/adapter",
      "sha256": {
        "adapter_config.json": "ae9ca2f38cd27b4e2b49dbe226041641132e52ea567a64da28482ff6bc902bb7",
        "adapter_model.safetensors": "ed1777e6ead37218a7bdc439582d1e42ed74a5c41ccf5038aec0d901fc5bdb3b"
      }
    }
  ],
  "files": {
    "config.json": {
      "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
      "size": 2
    },
    "serve.yaml": {
      "sha256": "fe231a44c76517c7431334e7b54e565a706190dd7fd6687549c28f93f19f58c8",
      "size": 41
    }
  },
  "parity": {
    "met": true,
    "engines": {
      "vllm": {
        "status": "met"
      }
    }
  }
}
');
INSERT INTO "export" VALUES('medical-qa',3,'vllm','vllm',NULL,43,'','{
  "format": 1,
  "lora2serve": "0.1.0",
  "target": "vllm",
  "name": "model",
  "run": "run-2",
  "base": {
    "id": "org/base",
    "fingerprint": {
      "config": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
      "tensors": "6f72672f62617365000000000000000000000000000000000000000000000000"
    }
  },
  "adapter": {
    "path": "/home/user/run-2/adapter",
    "sha256": {
      "adapter_config.json": "ae9ca2f38cd27b4e2b49dbe226041641132e52ea567a64da28482ff6bc902bb7",
      "adapter_model.safetensors": "3aeed278fc805b9bcb7243093f3baf84949b8fe7a13fb02408dc2f253cf9899f"
    }
  },
  "adapters": [
    {
      "path": "/home/user/run-2/adapter",
      "sha256": {
        "adapter_config.json": "ae9ca2f38cd27b4e2b49dbe226041641132e52ea567a64da28482ff6bc902bb7",
        "adapter_model.safetensors": "3aeed278fc805b9bcb7243093f3baf84949b8fe7a13fb02408dc2f253cf9899f"
      }
    }
  ],
  "files": {
    "config.json": {
      "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
      "size": 2
    },
    "serve.yaml": {
      "sha256": "fe231a44c76517c7431334e7b54e565a706190dd7fd6687549c28f93f19f58c8",
      "size": 41
    }
  },
  "parity": {
    "met": true,
    "engines": {
      "vllm": {
        "status": "met"
      }
    }
  }
}
');
CREATE TABLE file (
	name TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	path TEXT NOT NULL, 
	sha256 TEXT NOT NULL, 
	size BIGINT NOT NULL, 
	PRIMARY KEY (name, number, path), 
	CONSTRAINT file_of_version FOREIGN KEY(name, number) REFERENCES version (name, number)
);
INSERT INTO "file" VALUES('medical-qa',1,'adapter/adapter_config.json','ae9ca2f38cd27b4e2b49dbe226041641132e52ea567a64da28482ff6bc902bb7',141);
INSERT INTO "file" VALUES('medical-qa',1,'adapter/adapter_model.safetensors','16e76767cf01d04b40551bed6b1ef90f1afcb649967e5539a3fa6c2efa31f6a8',504);
INSERT INTO "file" VALUES('medical-qa',1,'eval.jsonl','000693b3a77e54a3159f9beedf4a3d906bd5c550b760a13fa624723e1857a5eb',35);
INSERT INTO "file" VALUES('medical-qa',1,'evals/medqa-acc-2026-07-01-0.7.json','939d26833188b106f895d8c713be7edee323d06f43a65877b2d266fcc6359e19',221);
INSERT INTO "file" VALUES('medical-qa',1,'recipe.yaml','d07ab1e7e8cc9611f5b3a4c9999dc9b1a7c0d74093ec6d5f8bb5459b44e4b5da',72);
INSERT INTO "file" VALUES('medical-qa',1,'run.json','2872b5747f9056329ae04e1c3e3842cad9a6ba1ac9fc5c6edb14f57054ae3b34',460);
INSERT INTO "file" VALUES('medical-qa',1,'exports/vllm/config.json','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a',2);
INSERT INTO "file" VALUES('medical-qa',1,'exports/vllm/serve.yaml','fe231a44c76517c7431334e7b54e565a706190dd7fd6687549c28f93f19f58c8',41);
INSERT INTO "file" VALUES('medical-qa',2,'adapter/adapter_config.json','ae9ca2f38cd27b4e2b49dbe226041641132e52ea567a64da28482ff6bc902bb7',141);
INSERT INTO "file" VALUES('medical-qa',2,'adapter/adapter_model.safetensors','ed1777e6ead37218a7bdc439582d1e42ed74a5c41ccf5038aec0d901fc5bdb3b',504);
INSERT INTO "file" VALUES('medical-qa',2,'eval.jsonl','000693b3a77e54a3159f9beedf4a3d906bd5c550b760a13fa624723e1857a5eb',35);
INSERT INTO "file" VALUES('medical-qa',2,'evals/medqa-acc-2026-07-02-0.71.json','47b277c220bb941cc3c564a32a12f6fd36b1c471f6bbe58f6281e7c8c4e9aaeb',222);
INSERT INTO "file" VALUES('medical-qa',2,'recipe.yaml','d07ab1e7e8cc9611f5b3a4c9999dc9b1a7c0d74093ec6d5f8bb5459b44e4b5da',72);
INSERT INTO "file" VALUES('medical-qa',2,'run.json','963f3fb043cd4a0f5451cfdb72a28fbbe5b1cb49d0f011f93a170726c3d85218',461);
INSERT INTO "file" VALUES('medical-qa',2,'exports/vllm/config.json','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a',2);
INSERT INTO "file" VALUES('medical-qa',2,'exports/vllm/serve.yaml','fe231a44c76517c7431334e7b54e565a706190dd7fd6687549c28f93f19f58c8',41);
INSERT INTO "file" VALUES('medical-qa',3,'adapter/adapter_config.json','ae9ca2f38cd27b4e2b49dbe226041641132e52ea567a64da28482ff6bc902bb7',141);
INSERT INTO "file" VALUES('medical-qa',3,'adapter/adapter_model.safetensors','3aeed278fc805b9bcb7243093f3baf84949b8fe7a13fb02408dc2f253cf9899f',504);
INSERT INTO "file" VALUES('medical-qa',3,'eval.jsonl','000693b3a77e54a3159f9beedf4a3d906bd5c550b760a13fa624723e1857a5eb',35);
INSERT INTO "file" VALUES('medical-qa',3,'evals/medqa-acc-2026-07-03-0.72.json','a80306d43dfee6088400caad17be081401c2f681020a0e0655e577593948277b',222);
INSERT INTO "file" VALUES('medical-qa',3,'recipe.yaml','d07ab1e7e8cc9611f5b3a4c9999dc9b1a7c0d74093ec6d5f8bb5459b44e4b5da',72);
INSERT INTO "file" VALUES('medical-qa',3,'run.json','0af0a9f4143b961a336e834658b39e83b1c83a390066532cf078625e7dd5c726',461);
INSERT INTO "file" VALUES('medical-qa',3,'exports/vllm/config.json','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a',2);
INSERT INTO "file" VALUES('medical-qa',3,'exports/vllm/serve.yaml','fe231a44c76517c7431334e7b54e565a706190dd7fd6687549c28f93f19f58c8',41);
CREATE TABLE score (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	suite TEXT NOT NULL, 
	suite_sha256 TEXT NOT NULL, 
	metric TEXT NOT NULL, 
	value FLOAT NOT NULL, 
	low FLOAT, 
	high FLOAT, 
	n BIGINT, 
	higher_is_better BOOLEAN NOT NULL, 
	engine TEXT NOT NULL, 
	created TEXT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name, number, suite, suite_sha256, metric, engine, created), 
	CONSTRAINT score_of_version FOREIGN KEY(name, number) REFERENCES version (name, number)
);
INSERT INTO "score" VALUES(1,'medical-qa',1,'heldout','000693b3a77e54a3159f9beedf4a3d906bd5c550b760a13fa624723e1857a5eb','loss',1.0,NULL,NULL,10,0,'training','2026-11-28T12:42:52Z');
INSERT INTO "score" VALUES(2,'medical-qa',1,'heldout','000693b3a77e54a3159f9beedf4a3d906bd5c550b760a13fa624723e1857a5eb','perplexity',2.0,NULL,NULL,10,0,'training','2026-11-28T12:42:52Z');
INSERT INTO "score" VALUES(3,'medical-qa',1,'medqa','5555555555555555555555555555555555555555555555555555555555555555','acc',0.7,NULL,NULL,200,1,'vllm 0.32.0','2026-07-01T00:00:00Z');
INSERT INTO "score" VALUES(4,'medical-qa',2,'heldout','000693b3a77e54a3159f9beedf4a3d906bd5c550b760a13fa624723e1857a5eb','loss',1.01,NULL,NULL,10,0,'training','2026-11-28T12:42:55Z');
INSERT INTO "score" VALUES(5,'medical-qa',2,'heldout','000693b3a77e54a3159f9beedf4a3d906bd5c550b760a13fa624723e1857a5eb','perplexity',2.0,NULL,NULL,10,0,'training','2026-11-28T12:42:55Z');
INSERT INTO "score" VALUES(6,'medical-qa',2,'medqa','5555555555555555555555555555555555555555555555555555555555555555','acc',0.71,NULL,NULL,200,1,'vllm 0.32.0','2026-07-02T00:00:00Z');
INSERT INTO "score" VALUES(7,'medical-qa',3,'heldout','000693b3a77e54a3159f9beedf4a3d906bd5c550b760a13fa624723e1857a5eb','loss',1.02,NULL,NULL,10,0,'training','2026-11-28T12:42:55Z');
INSERT INTO "score" VALUES(8,'medical-qa',3,'heldout','000693b3a77e54a3159f9beedf4a3d906bd5c550b760a13fa624723e1857a5eb','perplexity',2.0,NULL,NULL,10,0,'training','2026-11-28T12:42:55Z');
INSERT INTO "score" VALUES(9,'medical-qa',3,'medqa','5555555555555555555555555555555555555555555555555555555555555555','acc',0.72,NULL,NULL,200,1,'vllm 0.32.0','2026-07-03T00:00:00Z');
CREATE TABLE setting (
	"key" TEXT NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "setting" VALUES('schema','1');
INSERT INTO "setting" VALUES('content','');
CREATE TABLE version (
	name TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	sha256 TEXT NOT NULL, 
	state TEXT NOT NULL, 
	domain TEXT NOT NULL, 
	task TEXT NOT NULL, 
	note TEXT NOT NULL, 
	author TEXT NOT NULL, 
	created TEXT NOT NULL, 
	added TEXT NOT NULL, 
	run TEXT NOT NULL, 
	base TEXT NOT NULL, 
	base_sha256 TEXT NOT NULL, 
	method TEXT NOT NULL, 
	rank INTEGER, 
	alpha FLOAT, 
	learning_rate FLOAT, 
	steps BIGINT, 
	rows BIGINT, 
	quantization TEXT NOT NULL, 
	bytes BIGINT NOT NULL, 
	facts TEXT NOT NULL, 
	PRIMARY KEY (name, number), 
	UNIQUE (name, sha256)
);
INSERT INTO "version" VALUES('medical-qa',1,'db335683272d7b78b9add5cf406c20a38432b26631172f31223411a92744b275','active','medical','','','tester','2026-11-28T12:42:52Z','2026-11-28T12:42:54Z','run-0','org/base','3cf3dd4db3bb068874257f1c9aa332e2711b0d2ef0c3afbffed9d8e7856b1b0d','LORA',4,8.0,0.0002,10,100,'',1476,'{
 "base": {
  "id": "org/base",
  "fingerprint": {
   "config": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
   "tensors": "6f72672f62617365000000000000000000000000000000000000000000000000"
  }
 },
 "data": {
  "train": {
   "path": "train.jsonl",
   "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
   "rows": 100
  }
 },
 "recipe": {
  "model": {
   "path": "org/base"
  },
  "train": {
   "learning_rate": 0.0002,
   "lora": {
    "rank": 4
   }
  }
 },
 "targets": [
  "q_proj"
 ]
}
');
INSERT INTO "version" VALUES('medical-qa',2,'6a4d70868a57a55c3a77d76b0d951c5c77a31d8a05c9c5b59480116969c7651e','active','medical','','','tester','2026-11-28T12:42:55Z','2026-11-28T12:42:55Z','run-1','org/base','3cf3dd4db3bb068874257f1c9aa332e2711b0d2ef0c3afbffed9d8e7856b1b0d','LORA',4,8.0,0.0002,10,101,'',1478,'{
 "base": {
  "id": "org/base",
  "fingerprint": {
   "config": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
   "tensors": "6f72672f62617365000000000000000000000000000000000000000000000000"
  }
 },
 "data": {
  "train": {
   "path": "train.jsonl",
   "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
   "rows": 101
  }
 },
 "recipe": {
  "model": {
   "path": "org/base"
  },
  "train": {
   "learning_rate": 0.0002,
   "lora": {
    "rank": 4
   }
  }
 },
 "targets": [
  "q_proj"
 ]
}
');
INSERT INTO "version" VALUES('medical-qa',3,'773ce7a2efdd7ba6ebb2e73965649f82c31b2a44899e3e949dc5de932ca4d313','active','medical','','','tester','2026-11-28T12:42:55Z','2026-11-28T12:42:55Z','run-2','org/base','3cf3dd4db3bb068874257f1c9aa332e2711b0d2ef0c3afbffed9d8e7856b1b0d','LORA',4,8.0,0.0002,10,102,'',1478,'{
 "base": {
  "id": "org/base",
  "fingerprint": {
   "config": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
   "tensors": "6f72672f62617365000000000000000000000000000000000000000000000000"
  }
 },
 "data": {
  "train": {
   "path": "train.jsonl",
   "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
   "rows": 102
  }
 },
 "recipe": {
  "model": {
   "path": "org/base"
  },
  "train": {
   "learning_rate": 0.0002,
   "lora": {
    "rank": 4
   }
  }
 },
 "targets": [
  "q_proj"
 ]
}
');
CREATE INDEX version_by_domain ON version (domain);
CREATE INDEX version_by_created ON version (created);
CREATE INDEX event_by_name ON event (name, id);
CREATE INDEX file_by_content ON file (sha256);
CREATE INDEX score_by_metric ON score (suite, metric, created);
CREATE TRIGGER event_no_update BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
CREATE TRIGGER event_no_delete BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
COMMIT;
